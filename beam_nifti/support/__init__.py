"""What has nothing to do with volumes: text for people, logs, JSON, threads, memory and exit codes.

All modules are for all folders.
"""

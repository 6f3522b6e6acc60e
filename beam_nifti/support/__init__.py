"""Everything unrelated to volumes: messages, logs, JSON, threads, memory and exit codes.

Other folders may import all modules.
"""

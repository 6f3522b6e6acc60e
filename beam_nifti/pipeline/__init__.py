"""The build. Input: a manifest and a configuration. Output: a published dataset.

For other folders: `options`, `configure`, `parameters`, `python_calls`, `launch` and `watcher`, which run the
commands; `build`, `plan`, `survey` and `runners`, whose results they use; `conversion`, `relabeling` and
`withdrawal`, the parts of commands that write; `statistics_file`, `failures` and `resume`, which handle the
results of earlier builds; and `local_runner`, `metrics`, `outputs` and `progress`. Users import the steps
from `beam_nifti.transforms`.
"""

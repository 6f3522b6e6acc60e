"""The build. Input: a manifest and a configuration. Output: a published dataset.

For other folders: `options`, `configure`, `parameters`, `beam_flags`, `launch` and `watcher`, which run the
commands; `build`, `plan`, `survey` and `runners`, whose results they use; `conversion`, the part of `convert`
that writes; `failures` and `resume`, which handle the results of earlier builds;
and `local_runner`, `metrics`, `outputs` and `progress`. Users import the steps from `beam_nifti.transforms`.
"""

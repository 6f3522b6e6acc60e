"""The build. Input: a manifest and a configuration. Output: a published dataset.

For other folders: `build`, `plan`, `publish`, `check`, `survey`, `runners` and `follow`, which run the
commands; `conversion`, the part of `convert` that writes; `failures`, `parts` and `resume`, which handle the
results of earlier builds; and `local_runner`, `metrics`, `outputs` and `progress`. Users import the steps
from `beam_nifti.transforms`.
"""

"""The build: a manifest and a configuration come in, a published dataset goes out.

For other folders: `build`, `plan`, `publish`, `check`, `survey`, `runners` and `follow`, by which commands
run; what is left of builds, in `failures`, `parts` and `resume`; and `local_runner`, `metrics`, `outputs`
and `progress`. Of the steps themselves, in `transforms`, what users need is in `beam_nifti.transforms`.
"""

"""Reading for training. Input: a dataset. Output: tensors and arrays.

Users import `beam_nifti.reader` and `beam_nifti.random_access`. For other folders: `opening`,
`random_access`, `records`, `decoding`, `patches`, `grid` and `restoring`.
"""

"""Reading for training. Input: a dataset. Output: tensors and arrays.

Users import `beam_nifti.reader` and `beam_nifti.random_access`. No other folder imports from here.
"""

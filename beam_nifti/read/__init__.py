"""Reading for training: a dataset comes in, tensors and arrays go out.

Users import `beam_nifti.reader` and `beam_nifti.random_access`. No other folder imports from here.
"""

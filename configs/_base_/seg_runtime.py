# What every segmentation config of the project runs with that has no whole config of
# MMSegmentation to inherit from; those that have add plugin.py alone.
_base_ = ['mmseg::_base_/default_runtime.py', 'plugin.py']

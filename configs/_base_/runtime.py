# What every detection config of the project runs with.
_base_ = ['mmdet::_base_/default_runtime.py', 'plugin.py']

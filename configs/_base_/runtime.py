# What every config of the project runs with.
_base_ = 'mmdet::_base_/default_runtime.py'

custom_imports = dict(imports=['kw_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='RandomStateHook')]

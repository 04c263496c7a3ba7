# What makes a config of either toolbox one of the project.
custom_imports = dict(imports=['kw_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='RandomStateHook')]

"""The tests on the versions that are claimed: `make test-matrix`, or `nox -l` for the list.

    nox -s core                    # the core, each torch in a fresh environment, without OpenMMLab
    nox -s "core(python='3.10', torch='2.1.2', numpy='1.26.4')"
    nox -s pinned fork             # the whole suite on requirements.txt, and on the maintained fork
    nox -s prebuilt                # what upstream has wheels of mmcv for: torch 2.1, mmcv compiled

An environment takes 2 to 8 GB, because torch brings its CUDA libraries; each is removed when its
session has passed. What was run is in docs/versions.md.
"""
from __future__ import annotations

import shutil

import nox

nox.options.default_venv_backend = 'venv'
nox.options.error_on_missing_interpreters = True

# The oldest and the newest torch that are claimed and two between; each numpy with some of them.
CORE = [('3.10', '2.1.2', '1.26.4'), ('3.12', '2.5.1', '1.26.4'), ('3.11', '2.13.0', '2.4.6'),
        ('3.13', '2.15.0', '2.5.5')]
CORE_TESTS = ['tests/test_config.py', 'tests/test_plan.py', 'tests/test_assignment.py',
              'tests/layers', 'tests/convert', 'tests/inference', 'tests/ops']
DETECTOR_TESTS = ['tests/test_det_configs.py', 'tests/test_end_to_end.py', 'tests/engine',
                  'tests/models', 'tests/tools',
                  '--ignore=tests/tools/test_deployment_tools.py']  # needs the packages of files
ONE_THREAD = dict(OMP_NUM_THREADS='1')


@nox.session
@nox.parametrize('python, torch, numpy', CORE)
def core(session: nox.Session, torch: str, numpy: str) -> None:
    """The tests of the core, where torch and numpy are all there is."""
    session.install(f'torch=={torch}', f'numpy=={numpy}', 'pytest', 'hypothesis', 'packaging',
                    'safetensors', 'setuptools<82', 'wheel')
    # Editable, because the tests are of the checkout, with the compiled products of this Python.
    session.install('--no-build-isolation', '--no-deps', '-e', '.')
    session.run('python', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'not slow',
                *(session.posargs or CORE_TESTS), env=ONE_THREAD)
    shutil.rmtree(session.virtualenv.location)


def suite(session: nox.Session, *build: str) -> None:
    session.install('--no-build-isolation', '--no-deps', '-e', '.')
    session.run('python', 'tools/install/check_env.py', *build)
    session.run('python', '-m', 'pytest', '-q', *session.posargs, env=ONE_THREAD)


def demo(session: nox.Session) -> None:
    """Trains and tests the demo, in a folder that goes with the session."""
    session.run('python', 'tools/demo.py', '--work-dir', f'{session.create_tmp()}/demo')


@nox.session(python='3.11')
def pinned(session: nox.Session) -> None:
    """The whole suite on requirements.txt, mmcv compiled."""
    session.install('-c', 'requirements.txt', 'torch', 'numpy', 'setuptools', 'wheel', 'ninja',
                    'psutil')
    session.run('python', 'tools/install/build_mmcv.py', '-c', 'requirements.txt')
    session.install('-r', 'requirements.txt')
    suite(session, '--pins', 'requirements.txt')


@nox.session(python='3.12')
def fork(session: nox.Session) -> None:
    """The whole suite on the maintained fork, its mmcv compiled."""
    session.install('torch==2.12.0', 'numpy>2', 'setuptools<82', 'wheel', 'ninja', 'psutil')
    session.run('python', 'tools/install/build_mmcv.py', '--fork')
    session.install('onedl-mmengine==0.10.12', 'onedl-mmdetection==3.5.1',
                    'onedl-mmsegmentation==1.4.2', 'pytest', 'hypothesis', 'safetensors', 'onnx',
                    'onnxscript', 'onnxruntime', 'openvino')
    suite(session)
    demo(session)


@nox.session(python='3.10')
def prebuilt(session: nox.Session) -> None:
    """A detector on the newest torch for which upstream has wheels of mmcv, which is compiled."""
    session.install('torch==2.1.2', 'numpy<2', 'setuptools>=64,<82', 'wheel', 'ninja', 'psutil')
    session.run('python', 'tools/install/build_mmcv.py')
    session.install('-e', '.[openmmlab]', 'numpy<2', 'pytest', 'hypothesis', 'safetensors')
    session.run('python', 'tools/install/check_env.py')
    demo(session)
    session.run('python', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'not slow',
                *(session.posargs or DETECTOR_TESTS), env=ONE_THREAD)

"""Files of models for other runtimes: written with what they need to be told, and run."""
from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OPSET = 18
# The name of what a file says about itself, a text in JSON.
METADATA = 'kw_mm'
# One file serves all sizes between these.
MAX_BATCH, MIN_SIZE, MAX_SIZE = 1024, 32, 1 << 15

SUFFIXES = dict(onnx='.onnx', openvino='.xml', torch_export='.pt2', torchscript='.torchscript')
# What reads them, the usual one first.
RUNTIMES = {'.onnx': ('onnxruntime', 'openvino'), '.xml': ('openvino',), '.pt2': ('torch',),
            '.torchscript': ('torch',)}
PACKAGES = dict(onnx=('onnx', 'onnxscript'), openvino=('onnx', 'onnxscript', 'openvino'),
                torch_export=(), torchscript=())


def write_model(model: nn.Module, path: str | os.PathLike, to: str, example: tuple[Tensor, ...],
                input_names: Sequence[str], output_names: Sequence[str],
                metadata: Mapping[str, Any] | None = None, multiple: int = 32,
                translations: Mapping[Any, Callable] | None = None,
                any_batch: bool = True) -> None:
    """Writes a model to a file that takes any image size, and usually any batch size.

    Args:
        model: In the form for export (``prepare_for_export_``), on the CPU; returns a tensor or a
            tuple of them.
        path: Of the file, which ends as ``SUFFIXES`` says. One that is there is replaced.
        to: ``'onnx'``, ``'openvino'``, ``'torch_export'`` or ``'torchscript'``.
        example: Arguments to record the model with: the first one images ``(N, C, *spatial)``, all
            with the batch in front. N is at least 2 (unless it is to be the only one), each size
            at least twice ``multiple``, and no two sizes are the same, because torch takes ones,
            and what is equal, for constants.
        input_names: Of the arguments.
        output_names: Of what the model returns.
        metadata: What the file is to say about itself, plain values.
        multiple: What every spatial size is a multiple of. A file for any size, with 1, takes much
            longer to write, for then rounded sizes have to be proved to fit.
        translations: How operators of one's own are written in ONNX.
        any_batch: Whether the file takes any batch size; if not, that of the example alone.

    Raises:
        ImportError: If a package for the format is missing.
        OSError: If the file cannot be written.
        ValueError: If ``to`` is none of these, the path ends otherwise, or the model cannot be
            recorded for other sizes.
    """
    path = check_path(path, to)
    model.eval()
    text = json.dumps(dict(metadata or {}))
    with tempfile.TemporaryDirectory(prefix='.export-', dir=path.parent) as folder, \
            torch.no_grad(), warnings.catch_warnings():
        # About what others do: tracing of checks, and translations that are deprecated.
        warnings.simplefilter('ignore')
        made = Path(folder) / path.name
        if to == 'torchscript':
            traced = torch.jit.trace(model, example, check_trace=False)
            torch.jit.save(traced, made, _extra_files={METADATA: text})
        else:
            program = record(model, example, multiple, any_batch)
            if to == 'torch_export':
                torch.export.save(program, made, extra_files={METADATA: text})
            else:
                onnx = made.with_suffix('.onnx')
                _write_onnx(program, onnx, input_names, output_names, text, translations)
                if to == 'openvino':
                    _write_openvino(onnx, made, text)
                    for part in Path(folder).glob(f'{onnx.name}*'):
                        part.unlink()
        for part in sorted(Path(folder).iterdir(), key=lambda part: part == made):
            shutil.move(part, path.with_name(part.name))


def record(model: nn.Module, example: tuple[Tensor, ...], multiple: int = 32,
           any_batch: bool = True) -> Any:
    """The program of a model for any image size; see ``write_model``.

    Raises:
        ValueError: If part of the model computes something from the example's sizes.
    """
    batch = {0: torch.export.Dim('batch', min=1, max=MAX_BATCH)} if any_batch else {}
    spatial = {}
    for dim in range(2, example[0].dim()):
        size = torch.export.Dim(f'size{dim}', min=-(-MIN_SIZE // multiple),
                                max=MAX_SIZE // multiple)
        spatial[dim] = size if multiple == 1 else multiple * size
    shapes = ({**batch, **spatial}, *(batch for _ in example[1:]))
    try:
        return torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    except (torch._dynamo.exc.UserError, RuntimeError, ValueError) as error:
        raise ValueError('the model cannot be recorded for other batch and image sizes than the '
                         f"example's: {error}") from error


def check_path(path: str | os.PathLike, to: str) -> Path:
    """Checks that a file of a format can be written, before work is done.

    Raises:
        ImportError: If a package for the format is missing, or torch is too old for it.
        OSError: If the folder does not exist or cannot be written to.
        ValueError: If ``to`` is no format, or the path ends otherwise than its files do.
    """
    if to not in SUFFIXES:
        raise ValueError(f'to must be one of {list(SUFFIXES)}, got {to!r}')
    # Not a text like others, it compares as a version.
    if to != 'torchscript' and torch.__version__ < '2.6':
        raise ImportError(f'{to} files need torch 2.6 or newer, which finds out what sizes may '
                          f'change, got {torch.__version__}; torchscript files need no more')
    for package in PACKAGES[to]:
        need(package)
    file = Path(path).expanduser()
    if file.suffix != SUFFIXES[to]:
        raise ValueError(f'the path of an {to} file must end in {SUFFIXES[to]}, got {str(path)!r}')
    if file.is_dir():
        raise IsADirectoryError(f'{str(path)!r} must be a file to write, it is a folder')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f'{str(path)!r} cannot be written: its folder cannot be made '
                          f'({error.strerror})') from error
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(f'{str(path)!r} cannot be written: its folder is read-only')
    return file


def need(package: str) -> Any:
    """Imports a package of the extra ``deploy``.

    Raises:
        ImportError: If it is missing, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is missing; type: pip install 'kw_mm[deploy]'",
                          name=package) from error


def _write_onnx(program: Any, path: Path, input_names: Sequence[str],
                output_names: Sequence[str], text: str,
                translations: Mapping[Any, Callable] | None) -> None:
    made: Any = torch.onnx.export(
        program, input_names=list(input_names), output_names=list(output_names),
        opset_version=OPSET, dynamo=True, custom_translation_table=dict(translations or {}),
        verbose=False)
    made.model.metadata_props.clear()
    made.model.metadata_props[METADATA] = text
    # Where each operator comes from, for debuggers: as long as the graph itself.
    for node in made.model.graph:
        node.metadata_props.clear()
    made.save(path)


def _write_openvino(onnx: Path, path: Path, text: str) -> None:
    openvino = need('openvino')
    model = openvino.convert_model(str(onnx))
    model.set_rt_info(text, [METADATA])
    openvino.save_model(model, str(path), compress_to_fp16=False)


class ModelFile:
    """A file of a model, ready to run on the CPU.

    Args:
        path: Of the file.
        threads: How many to use; None for the runtime's choice.
        runtime: One of ``RUNTIMES``; None for the one that the path's ending asks for. OpenVINO
            reads ONNX files as well.

    Attributes:
        metadata: What the file says about itself.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If its runtime is missing.
        ValueError: If its ending is none of ``SUFFIXES``, the runtime is none that reads such
            files, or it cannot read this one.
    """

    def __init__(self, path: str | os.PathLike, threads: int | None = None,
                 runtime: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f'file {str(path)!r} does not exist')
        suffix = self.path.suffix
        if suffix not in RUNTIMES:
            raise ValueError(f'the file of a model must end in {" or ".join(RUNTIMES)}, got '
                             f'{str(path)!r}')
        runtime = runtime or RUNTIMES[suffix][0]
        if runtime not in RUNTIMES[suffix]:
            raise ValueError(f'runtime must be {" or ".join(RUNTIMES[suffix])} for {str(path)!r}, '
                             f'got {runtime!r}')
        openers = dict(onnxruntime=self._open_onnx, openvino=self._open_openvino,
                       torch=self._open_export if suffix == '.pt2' else self._open_script)
        try:
            text, self._call = openers[runtime](threads)
        except ImportError:
            raise
        except Exception as error:  # each runtime has types of its own
            raise ValueError(f'{str(path)!r} must be a file that {runtime} reads: '
                             f'{error}') from error
        self.metadata: dict[str, Any] = json.loads(text or '{}')

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """The model's outputs."""
        return self._call(*inputs)

    def _open_onnx(self, threads: int | None) -> tuple[str, Callable]:
        onnxruntime = need('onnxruntime')
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(str(self.path), options,
                                               providers=['CPUExecutionProvider'])
        names = [entry.name for entry in session.get_inputs()]
        text = session.get_modelmeta().custom_metadata_map.get(METADATA, '')
        return text, lambda *inputs: session.run(None, dict(zip(names, inputs)))

    def _open_openvino(self, threads: int | None) -> tuple[str, Callable]:
        openvino = need('openvino')
        core = openvino.Core()
        model = core.read_model(str(self.path))
        # The properties of an ONNX file are kept one level below.
        places = [place for place in ([METADATA], ['framework', METADATA])
                  if model.has_rt_info(place)]
        text = model.get_rt_info(places[0]).astype(str) if places else ''
        # Half precision, which newer CPUs would be given, is not what is compared here.
        settings: dict[str, Any] = dict(INFERENCE_PRECISION_HINT='f32')
        if threads:
            settings['INFERENCE_NUM_THREADS'] = threads
        request = core.compile_model(model, 'CPU', settings).create_infer_request()
        return text, lambda *inputs: [np.array(value) for value in
                                      request.infer(list(inputs)).values()]

    def _open_export(self, threads: int | None) -> tuple[str, Callable]:
        extra = {METADATA: ''}
        module = torch.export.load(self.path, extra_files=extra).module()
        return extra[METADATA], _caller(module, threads)

    def _open_script(self, threads: int | None) -> tuple[str, Callable]:
        extra = {METADATA: ''}
        module = torch.jit.load(self.path, _extra_files=extra)
        text: Any = extra[METADATA]
        return text.decode() if isinstance(text, bytes) else text, _caller(module, threads)


def _caller(module: Any, threads: int | None) -> Callable:
    def call(*inputs: np.ndarray) -> list[np.ndarray]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            with torch.no_grad():
                found = module(*map(torch.from_numpy, inputs))
        finally:
            torch.set_num_threads(before)
        return [y.numpy() for y in ([found] if isinstance(found, Tensor) else found)]

    return call

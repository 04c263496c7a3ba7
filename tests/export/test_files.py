"""Files: equal to PyTorch in each runtime, at batch sizes and image sizes of one file."""
import copy
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from matrix import MODELS
from optimised import bases_everywhere, error, outputs, randomise
from tensorrt_table import find_violations
from torch import nn

from kw_mm import KWConv1d, KWConv2d, KWConv3d, KWLinear, prepare_for_export_
from kw_mm.export import ModelFile, write_model
from kw_mm.export.files import OPSET, SUFFIXES, check_path

CONVS = (KWConv1d, KWConv2d, KWConv3d)
CASES = ((1, 64, 96), (2, 96, 32), (5, 64, 64))
NAMES = [name for name in MODELS if name not in ('cells', 'bases')]


def write(tmp_path, model, to, weights='cells', multiple=32, dims=2, channels=3, outputs=None,
          batch_size=None):
    twin = copy.deepcopy(model)
    with bases_everywhere():
        prepare_for_export_(twin, weights, batch_size=batch_size)
    example = torch.zeros(batch_size or 2, channels, *(64, 96, 128)[:dims])
    names = [f'level{i}' for i in range(outputs or 1)]
    path = tmp_path / f'model{SUFFIXES[to]}'
    write_model(twin, path, to, (example,), ['images'], names, dict(about='a test'), multiple,
                any_batch=batch_size is None)
    return path


def check(path, model, cases, runtime=None):
    run = ModelFile(path, 1, runtime)
    assert run.metadata == dict(about='a test')
    for shape in cases:
        x = torch.randn(shape)
        found = [torch.from_numpy(y) for y in run(x.numpy())]
        assert error(found, outputs(model, x)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('name, weights', [*zip(NAMES, ['cells', 'bases'] * 3)])
def test_onnx_of_networks(tmp_path, name, weights):
    model = randomise(MODELS[name]())
    count = len(outputs(model, torch.zeros(1, 3, 64, 64)))
    cases = [(batch, 3, *size) for batch, *size in CASES]
    path = write(tmp_path, model, 'onnx', weights, outputs=count)
    check(path, model, cases)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [OPSET]
    assert not find_violations(proto)
    if name in ('resnet18', 'convnext'):
        # The same file through the other runtime's reader, and that runtime's own format.
        check(write(tmp_path, model, 'openvino', weights, outputs=count), model, cases)


@pytest.mark.parametrize('kwargs', [
    dict(dims=1, stride=2, padding=2), dict(dims=3, padding=1, groups=2),
    dict(padding='same', padding_mode='reflect', dilation=2),
    dict(padding=1, padding_mode='circular', groups=4), dict(padding=2, padding_mode='replicate')])
def test_onnx_of_layers(tmp_path, kwargs):
    dims = kwargs.pop('dims', 2)
    model = randomise(nn.Sequential(CONVS[dims - 1](4, 8, 3, **kwargs)))
    path = write(tmp_path, model, 'onnx', dims=dims, channels=4)
    check(path, model, [(batch, 4, *(32, 64, 32)[:dims]) for batch in (1, 3)])
    assert not find_violations(onnx.load(path))


@pytest.mark.parametrize('batch_size', [1, 3])
def test_a_single_batch_size(tmp_path, batch_size):
    # One convolution with a computed kernel for each layer: its shape must be known in the file.
    model = randomise(nn.Sequential(
        KWConv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), KWConv2d(8, 8, 3, groups=2),
        KWConv2d(8, 4, 1)))
    path = write(tmp_path, model, 'onnx', 'bases', batch_size=batch_size)
    proto = onnx.load(path)
    assert sum(node.op_type == 'Conv' for node in proto.graph.node) == 3
    assert not find_violations(proto)
    for runtime in ('onnxruntime', 'openvino'):
        check(path, model, [(batch_size, 3, 64, 96), (batch_size, 3, 32, 32)], runtime)


def test_any_size(tmp_path):
    model = randomise(nn.Sequential(
        KWConv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), KWConv2d(8, 4, 1, stride=2)))
    path = write(tmp_path, model, 'onnx', multiple=1)
    check(path, model, [(1, 3, 37, 51), (3, 3, 64, 33)])


def test_linear_layers(tmp_path):
    model = randomise(nn.Sequential(KWConv2d(3, 4, 1), nn.Flatten(2), nn.ReLU()))

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.linear = model, randomise(KWLinear(4, 6))

        def forward(self, x):
            return self.linear(self.stem(x).transpose(1, 2))

    net = Tokens().eval()
    check(write(tmp_path, net, 'onnx'), net, [(1, 3, 32, 64), (3, 3, 64, 32)])


FRESH = """
import sys, json, numpy as np, torch
{opening}
x = torch.from_numpy(np.load(sys.argv[2]))
np.save(sys.argv[3], model(x)[0].detach().numpy())
assert 'kw_mm' not in sys.modules
"""
OPENINGS = dict(torch_export='model = torch.export.load(sys.argv[1]).module()',
                torchscript='model = torch.jit.load(sys.argv[1])')


@pytest.mark.slow
@pytest.mark.parametrize('to', OPENINGS)
def test_torch_s_files_in_a_fresh_process(tmp_path, to):
    model = randomise(MODELS['resnet18']())
    path = write(tmp_path, model, to)
    check(path, model, [(1, 3, 32, 64), (5, 3, 96, 64)])
    x = torch.randn(3, 3, 96, 64)
    np.save(tmp_path / 'x.npy', x.numpy())
    # Neither kw_mm nor anything of OpenMMLab is needed there.
    subprocess.run([sys.executable, '-c', FRESH.format(opening=OPENINGS[to]), path,
                    tmp_path / 'x.npy', tmp_path / 'y.npy'], check=True)
    found = torch.from_numpy(np.load(tmp_path / 'y.npy'))
    assert error((found,), outputs(model, x)[:1]) < 1e-5


class Fixed(nn.Module):
    """Takes images of one size."""

    def forward(self, x):
        return x.reshape(2, 3, 64, 96) * 2


def test_what_cannot_be_written_is_told(tmp_path, monkeypatch):
    model, example = nn.Conv2d(3, 3, 1).eval(), (torch.zeros(2, 3, 64, 96),)
    arguments = example, ['images'], ['y']
    with pytest.raises(ValueError, match='to must be one of'):
        write_model(model, tmp_path / 'm.onnx', 'tensorrt', *arguments)
    with pytest.raises(ValueError, match=r'must end in \.onnx'):
        write_model(model, tmp_path / 'm.pt', 'onnx', *arguments)
    (tmp_path / 'm.onnx').mkdir()
    with pytest.raises(IsADirectoryError, match='it is a folder'):
        write_model(model, tmp_path / 'm.onnx', 'onnx', *arguments)
    with pytest.raises(ValueError, match='cannot be recorded for other batch and image sizes'):
        write_model(Fixed(), tmp_path / 'm.pt2', 'torch_export', *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ['m.onnx']
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='file/m.onnx. cannot be written: its folder cannot be made'):
        write_model(model, tmp_path / 'file/m.onnx', 'onnx', *arguments)
    monkeypatch.setattr('kw_mm.export.files.os.access', lambda *_: False)
    with pytest.raises(PermissionError, match='its folder is read-only'):
        write_model(model, tmp_path / 'n.onnx', 'onnx', *arguments)
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r"onnxscript is missing; type: pip install 'kw_mm\[dep"):
        write_model(model, tmp_path / 'n.onnx', 'onnx', *arguments)


def test_torch_that_is_too_old_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, '__version__', type(torch.__version__)('2.5.1+cpu'))
    with pytest.raises(ImportError, match=r'onnx files need torch 2.6 or newer.*got 2.5.1'):
        check_path(tmp_path / 'm.onnx', 'onnx')
    assert check_path(tmp_path / 'm.torchscript', 'torchscript')


def test_what_is_no_file_of_a_model_is_told(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        ModelFile(tmp_path / 'm.onnx')
    (tmp_path / 'm.txt').write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r'must end in \.onnx or'):
        ModelFile(tmp_path / 'm.txt')
    (tmp_path / 'm.xml').write_text('')
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ImportError, match='openvino is missing'):
        ModelFile(tmp_path / 'm.xml')
    (tmp_path / 'm.pt2').write_text('')
    # Each runtime has an error of its own.
    for name in ('m.pt2', 'n.onnx', 'n.torchscript'):
        (tmp_path / name).write_text('nothing')
        with pytest.raises(ValueError, match=f'{name}. must be a file that .* reads'):
            ModelFile(tmp_path / name)
    with pytest.raises(ValueError, match='runtime must be torch for .* got .openvino.'):
        ModelFile(tmp_path / 'm.pt2', runtime='openvino')

"""Finds checkpoints by name: files, URLs, and the names of model zoos."""
from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_rank
from mmengine.runner import checkpoint as mmengine_checkpoint

# The files that torchvision's names stand for, so that torchvision need not be installed. The
# digits are the file's hash.
TORCHVISION_FILES = {
    'resnet18': 'resnet18-f37072fd.pth',
    'resnet34': 'resnet34-b627a593.pth',
    'resnet50': 'resnet50-0676ba61.pth',
    'resnet101': 'resnet101-63fe2227.pth',
    'resnet152': 'resnet152-394f9c45.pth',
    'mobilenet_v2': 'mobilenet_v2-b0353104.pth',
    'convnext_tiny': 'convnext_tiny-983f1562.pth',
    'convnext_small': 'convnext_small-0c510722.pth',
    'convnext_base': 'convnext_base-6075fbad.pth',
    'convnext_large': 'convnext_large-ea097f82.pth',
}
TORCHVISION_URL = 'https://download.pytorch.org/models/'


class DownloadFailed(ConnectionError):
    """A checkpoint cannot be downloaded, most often because there is no network."""


def locate_checkpoint(name: str) -> str:
    """Turns the name of a checkpoint into the path of a file, which is downloaded if need be.

    Args:
        name: A path, a URL (``https://``, ``http://``), ``torchvision://resnet50`` and the other
            names of ``TORCHVISION_FILES``, or ``open-mmlab://`` and a name mmengine knows. What
            is downloaded is kept in torch's folder for checkpoints: under its own name if that
            has the hash of the content, else in a folder for each URL.

    Raises:
        ValueError: If a model zoo has no such name.
        DownloadFailed: If it cannot be downloaded.
    """
    scheme, _, rest = name.partition('://')
    if scheme in ('modelzoo', 'torchvision') and rest:
        if rest not in TORCHVISION_FILES:
            raise ValueError(f"checkpoint {name!r} must be one of torchvision's "
                             f'{sorted(TORCHVISION_FILES)}; of others give the URL')
        return _download(TORCHVISION_URL + TORCHVISION_FILES[rest])
    if scheme in ('open-mmlab', 'openmmlab') and rest:
        rest = mmengine_checkpoint.get_deprecated_model_names().get(rest, rest)
        urls = mmengine_checkpoint.get_external_models()
        if rest not in urls:
            raise ValueError(f'checkpoint {name!r} must be one that mmengine knows, {rest!r} is '
                             'not; give the URL')
        return locate_checkpoint(urls[rest])
    if scheme in ('http', 'https') and rest:
        return _download(name)
    if rest and len(scheme) > 1:
        raise ValueError(f'checkpoint {name!r} must be a path, a URL, or a name with '
                         'torchvision:// or open-mmlab://')
    return name


def _download(url: str) -> str:
    folder, name = Path(torch.hub.get_dir(), 'checkpoints'), Path(urlparse(url).path).name
    # Matches hashes, but not dates.
    digits = re.search(r'-((?!20\d{6}\.)[0-9a-f]{8,})\.', name)
    if digits is None:
        # Such a name does not identify the content; other URLs may end in it too.
        folder /= hashlib.sha256(url.encode()).hexdigest()[:16]
    file = folder / name
    # The first process downloads it. Processes that do not share its disk do so afterwards.
    for turn in (True, False):
        if (get_rank() == 0) == turn and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(file), digits and digits[1], progress=turn)
            except URLError as error:
                raise DownloadFailed(
                    f'{url} cannot be downloaded ({error}); without a network, fetch it elsewhere '
                    'and name the file, in a config with --cfg-options '
                    'model.backbone.init_cfg.checkpoint=FILE') from error
        if turn:
            barrier()
    return str(file)

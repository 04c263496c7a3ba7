"""Commands and snippets of README and docs."""
import importlib
import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import pytest
from mmengine.config import Config

from kw_mm import KWResNet

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md')),
         *sorted((ROOT / 'configs').glob('*/README.md'))]
BLOCK = re.compile(r'^( *)```(\w*)\n(.*?)^ *```', re.M | re.S)
# What the pages name of other projects.
ELSEWHERE = ['docs/operators.md']


def blocks(page, language):
    return [re.sub(rf'^{indent}', '', text, flags=re.M)
            for indent, lang, text in BLOCK.findall(page.read_text()) if lang == language]


def named(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        if '://' in target:
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r'^#+ (.*)$', file.read_text(), re.M)
            slugs = [re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings]
            assert anchor in slugs, target


def inline_code(page):
    return [code.replace('\n', ' ')
            for code in re.findall(r'`([^`]+)`', BLOCK.sub('', page.read_text()))]


def commands(page):
    """The lines of the page's shell blocks, and what is typed in its sentences."""
    for text in blocks(page, 'bash'):
        for line in text.replace('\\\n', ' ').splitlines():
            yield line.replace('  # or ', '\n').partition('  #')[0]
    yield from inline_code(page)


def tool_commands(page):
    """Each command that calls one of our tools: the tool's source and the words that follow."""
    for command in commands(page):
        for tool, words in re.findall(r'\bpython (tools/\S+)(.*)', command):
            words = words.replace("'", '').split()
            path = ROOT / tool
            if tool == 'tools/benchmark':
                path = path / 'kw_benchmark' / f'{words.pop(0)}.py'
            yield path, words


def load(path):
    spec = importlib.util.spec_from_file_location(f'{path.stem}_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def options_of(path):
    """The options of a tool, and those of them that must be given."""
    source = path.read_text()
    if 'def make_parser' in source:
        module = (importlib.import_module(f'kw_benchmark.{path.stem}')
                  if path.parent.name == 'kw_benchmark' else load(path))
        text = module.make_parser().format_usage()
    else:
        text = ' '.join(f'[{option}]' for option in re.findall("'(--.*?)'", source))
    return set(re.findall(r'--[\w-]+', text)), set(re.findall(r'(?<!\S)(?<!\| )--[\w-]+', text))


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_commands_have_tools_and_options_that_exist(page, monkeypatch):
    for path, words in tool_commands(page):
        assert path.is_file(), path
        monkeypatch.syspath_prepend(path.parent)
        known, required = options_of(path)
        given = {word.partition('=')[0] for word in words if word.startswith('--')}
        assert given <= known | {'--help'}, path
        # `python tools/benchmark tune` was an error, for want of --out.
        assert required <= given or '--help' in given, path
        for word in words:
            if word.startswith('configs/') and '<' not in word and '.py' in word:
                assert (ROOT / word).is_file(), word


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_what_is_made_can_be_made(page):
    makefile = (ROOT / 'Makefile').read_text()
    for command in commands(page):
        match = re.match(r'make ([a-z-]+)((?: +[A-Z_]+=\S*)*)', command)
        if match:
            assert re.search(rf'^{match[1]}:', makefile, re.M), command
            for variable in re.findall(r'[A-Z_]+(?==)', match[2]):
                assert f'$({variable})' in makefile, command


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_files_that_are_named_exist(page):
    path = re.compile(r'(?:configs|docs|kw_mm|tests|tools|\.ci)/[\w./-]+')
    for code in inline_code(page):
        if path.fullmatch(code) and 'NAME' not in code and code not in ELSEWHERE:
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize('page, heading', [
    ('README.md', '## In Python'), ('docs/conversion.md', '## In Python'),
    ('docs/conversion.md', 'A type of your own'), ('docs/performance.md', '## For inference')])
def test_snippets_run(page, heading):
    text = (ROOT / page).read_text()
    section = text[text.index(heading):]
    code = BLOCK.search(section)
    assert code[2] == 'python'
    exec(compile(code[3], page, 'exec'), {'model': KWResNet(18, base_channels=16).eval()})


def test_voc_files_become_coco_s_format(tmp_path, monkeypatch):
    box = ('<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>9</xmax>'
           '<ymax>7</ymax></bndbox></object>')
    for folder in ('ImageSets/Main', 'Annotations'):
        (tmp_path / 'BCCD' / folder).mkdir(parents=True)
    for split, name in (('trainval', 'a'), ('test', 'b')):
        (tmp_path / f'BCCD/ImageSets/Main/{split}.txt').write_text(f'{name}\n')
        (tmp_path / f'BCCD/Annotations/{name}.xml').write_text(
            '<annotation><size><width>20</width><height>10</height></size>'
            f'{box.format("WBC", 1)}{box.format("RBC", 9)}</annotation>')
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / 'docs' / 'evidence.md', 'python')
    exec(compile(code, 'evidence.md', 'exec'), {})
    found = json.loads((tmp_path / 'bccd_val.json').read_text())
    assert found['images'] == [dict(id=1, file_name='b.jpg', width=20, height=10)]
    assert found['annotations'] == [dict(  # the other box has no area
        id=1, image_id=1, iscrowd=0, category_id=2, bbox=[1, 2, 8, 5], area=40)]
    assert [c['name'] for c in found['categories']] == ['RBC', 'WBC', 'Platelets']


def test_the_configs_in_the_docs_are_read(tmp_path):
    found = 0
    for page in PAGES:
        for text in blocks(page, 'python'):
            if '_base_ =' in text:
                path = tmp_path / 'config.py'
                path.write_text(text)
                assert Config.fromfile(path).model.backbone
                found += 1
    assert found >= 3


def test_a_base_of_this_package(tmp_path):
    # mmengine only knows OpenMMLab's packages: "does not support to load kw_mm config".
    path = tmp_path / 'config.py'
    path.write_text("_base_ = 'kw_mm::mask_rcnn/mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py'\n"
                    'model = dict(backbone=dict(base_channels=32))\n')
    backbone = Config.fromfile(path).model.backbone
    assert (backbone.type, backbone.base_channels) == ('KWResNet', 32)
    path.write_text("_base_ = 'kw_mm::no/such.py'\n")
    with pytest.raises(FileNotFoundError, match="base 'kw_mm::no/such.py' of .* must be a config"):
        Config.fromfile(path)


def test_sizes_of_images_in_configs_of_pure_python():
    # Their types are classes, which hid the Resize.
    from mmdet.datasets.transforms import Resize

    from kw_mm.engine.complexity import input_size
    cfg = Config(dict(model={}, test_dataloader=dict(dataset=dict(pipeline=[
        dict(type=Resize, scale=(1333, 800), keep_ratio=True)]))))
    assert input_size(cfg) == (800, 1344)


def test_tools_are_importable_by_their_pages():
    # If a tool's parser cannot be built, its --help fails too.
    for tool in ('infer', 'test', 'train', 'demo', 'analysis_tools/check_data',
                 'model_converters/publish_model', 'model_converters/static2kw',
                 'model_converters/kw2static', 'deployment/check', 'deployment/export',
                 'deployment/latency', 'analysis_tools/inspect_mixing'):
        path = ROOT / 'tools' / f'{tool}.py'
        assert load(path).make_parser().format_help()
        # Other tests call their main.
        assert path.read_text().endswith("\nif __name__ == '__main__':\n    main()\n")

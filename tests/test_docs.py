"""Commands and snippets of README and docs."""
import importlib.util
import json
import re
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')),
         *sorted((ROOT / 'configs').glob('*/README.md'))]
BLOCK = re.compile(r'^( *)```(\w*)\n(.*?)^ *```', re.M | re.S)


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


def commands(page):
    """The words of each command in the page's shell blocks that calls one of our tools."""
    for text in blocks(page, 'bash'):
        for line in text.replace('\\\n', ' ').splitlines():
            line = line.partition('  #')[0].strip()
            match = re.match(r'python (tools/\S+\.py)\s*(.*)', line)
            if match:
                yield match[1], match[2].replace("'", '').split()


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_commands_have_tools_and_options_that_exist(page):
    for tool, words in commands(page):
        path = ROOT / tool
        assert path.is_file(), tool
        source = path.read_text()
        if 'launch.add_common_options' in source:
            source += (ROOT / 'kw_mm/engine/launch.py').read_text()
        for word in words:
            if word.startswith('--'):
                assert f"'{word.partition('=')[0]}'" in source, (tool, word)
            elif word.startswith('configs/') and '<' not in word and '.py' in word:
                assert (ROOT / word).is_file(), word


@pytest.mark.parametrize('page, heading', [
    ('README.md', '## In Python'), ('docs/conversion.md', '## In Python')])
def test_snippets_run(page, heading):
    text = (ROOT / page).read_text()
    section = text[text.index(heading):]
    code = BLOCK.search(section)
    assert code[2] == 'python'
    exec(compile(code[3], page, 'exec'), {})


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
        spec = importlib.util.spec_from_file_location('tool', ROOT / 'tools' / f'{tool}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.make_parser().format_help()
        # Other tests call their main.
        assert Path(spec.origin).read_text().endswith("\nif __name__ == '__main__':\n    main()\n")

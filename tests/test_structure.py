"""The package's order: imports go one way, and a name stands for one thing."""
import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'kw_mm'

# Each layer may import itself and those before it. CONTRIBUTING.md tells it in words.
LAYERS = (
    ('arguments', 'assignment', 'config', 'config_types', 'files', 'plan', 'plan_table', 'table',
     'unpickling', 'versions'),
    ('ops', 'checkpoint'),
    ('layers', 'resuming'),
    ('convert',),
    ('inference',),
    ('export',),
    ('crash_safety',),
    ('compat',),
    ('models', 'datasets'),
    ('engine',),
    ('deploy',),
    ('registration',),
    ('__init__',))
# These need torch and nothing of OpenMMLab.
CORE = ('arguments', 'assignment', 'checkpoint', 'config', 'config_types', 'files', 'plan',
        'plan_table', 'resuming', 'table', 'unpickling', 'versions', 'ops', 'layers', 'convert',
        'inference', 'export')
OPENMMLAB = {'mmcv', 'mmdet', 'mmengine', 'mmseg', 'mmpretrain'}


def modules():
    """Each file of the package, its name from the package's root, and its syntax tree."""
    for path in sorted(PACKAGE.rglob('*.py')):
        if '.mim' not in path.parts:
            yield path.relative_to(PACKAGE).with_suffix('').parts, ast.parse(path.read_text())


def imported(parts, tree):
    """Full names of what a module imports at any place, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ['kw_mm', *parts][:-node.level] if node.level else []
            module = [*base, *(node.module or '').split('.')]
            module = [name for name in module if name]
            # `from .. import checkpoint` names a module, `from ..checkpoint import read` does not.
            for alias in node.names:
                yield '.'.join([*module, alias.name] if module == ['kw_mm'] else module)


def test_no_import_runs_back_up():
    rank = {name: i for i, names in enumerate(LAYERS) for name in names}
    wrong = []
    for parts, tree in modules():
        for name in imported(parts, tree):
            package, *rest = name.split('.')
            target = rest[0] if rest else '__init__'
            if package == 'kw_mm' and rank.get(target, rank['__init__']) > rank[parts[0]]:
                wrong.append(f'{"/".join(parts)} imports {name}')
    assert wrong == []


def test_the_core_needs_no_openmmlab():
    wrong = [f'{"/".join(parts)} imports {name}' for parts, tree in modules() if parts[0] in CORE
             for name in imported(parts, tree) if name.partition('.')[0] in OPENMMLAB]
    assert wrong == []


def test_the_order_names_every_module():
    named = [name for names in LAYERS for name in names]
    assert sorted(named) == sorted({parts[0] for parts, _ in modules()})


def test_names_stand_for_one_thing():
    # Four pairs of classes had one name, and three MIN_WIDTH meant three things.
    found = defaultdict(list)
    for parts, tree in modules():
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets
                         if isinstance(target, ast.Name) and target.id.isupper()]
            for name in names:
                if not name.startswith('_'):
                    found[name].append('/'.join(parts))
    double = {name: places for name, places in found.items() if len(places) > 1}
    # How many names a message shows, in each place.
    double.pop('MAX_NAMES', None)
    assert double == {}

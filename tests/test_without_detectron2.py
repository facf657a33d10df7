"""Detectron2 is optional: without it all else imports, and what needs it says so in one line."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_everything_else_works_without_detectron2():
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "import det_plugin.train, det_plugin.predict, det_plugin.figures, det_plugin.torchvision_engine.train\n"
        "import seg_plugin, pretrain.train\n"
        "from pretrain.errors import UserError\n"
        "import pkgutil, det_plugin\n"
        "folder = det_plugin.__path__[0]\n"
        "engine = [name for _, name, _ in pkgutil.iter_modules([folder + '/detectron2_engine'])]\n"
        "assert {'lazy', 'train', 'predict'} <= set(engine)\n"
        "for name in [*(f'detectron2_engine.{name}' for name in engine), 'benchmark.backbone', 'benchmark.step']:\n"
        "    try: __import__('det_plugin.' + name)\n"
        "    except UserError as error: assert 'not installed' in str(error) and '--engine torchvision' in str(error)\n"
        "    else: raise SystemExit(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_test_file_fails_for_want_of_it():
    """They are collected, and skip what needs it."""
    code = (
        "import sys, pytest; sys.modules['detectron2'] = None\n"
        "from pathlib import Path\n"
        "files = [str(f) for f in sorted(Path('tests').glob('test_*.py')) if 'detectron2' in f.read_text()]\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *files]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]

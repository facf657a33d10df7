"""Detectron2 is optional: without it all else imports, and what needs it says so in one line."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_everything_else_works_without_detectron2():
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "import det_plugin.run, det_plugin.protocol, det_plugin.features, det_plugin.torchvision_engine.train\n"
        "import seg_plugin, pretrain.train\n"
        "from pretrain.errors import UserError\n"
        "for name in 'lazy backbone bfloat16 evaluator trainer coco_catalog detectron2_loader saved_config'.split():\n"
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

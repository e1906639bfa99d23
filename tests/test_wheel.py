"""The wheel, installed alone in an empty environment and used outside the checkout."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

from shapes import draw_shapes

ROOT = Path(__file__).parent.parent


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(1500)
def test_the_wheel_fits_and_exports_without_torch(small_target, tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[client]", cwd=tmp_path)
    shutil.copy(small_target, tmp_path / "classifier.onnx")
    (tmp_path / "clean").mkdir()
    for i, image in enumerate(draw_shapes(80, seed=13)[0]):
        Image.fromarray(image).save(tmp_path / "clean" / f"{i}.png")
    diffense = python.with_name("diffense")
    assert "fit" in run(diffense, "--help", cwd=tmp_path)
    run(diffense, "fit", "classifier.onnx", "clean", "--alpha", "0.05", "--out", "guard", cwd=tmp_path)
    run(diffense, "export", "guard", "--target", "classifier.onnx", "--repository", "models", "--model", "m", cwd=tmp_path)
    assert (tmp_path / "models" / "m_guarded" / "config.pbtxt").is_file()
    light = "import sys, diffense, diffense_client; print(sorted({'torch', 'onnx'} & set(sys.modules)))"
    assert run(python, "-c", light, cwd=tmp_path).strip() == "[]"

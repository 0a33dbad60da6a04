"""The command `luthier webchat`: the chat with one run file, at the address that it prints."""

import subprocess
import sys

import httpx
import pytest
import yaml

from luthier.cli import main
from tests.small_world import small_world


def test_a_wrong_run_file_is_refused_before_anything_is_served(tmp_path, capsys):
    run_file = tmp_path / "chat.yaml"
    run_file.write_text("model_name_or_path: /nowhere\ntemplat: chatml\n", "utf-8")
    assert main(["webchat", str(run_file)]) == 2
    error = capsys.readouterr().err
    assert "did you mean template" in error and "/nowhere" in error
    assert main(["webchat"]) == 2
    assert "which run file?" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_page_names_the_model_and_is_the_only_one(tmp_path):
    values = small_world(tmp_path)
    run_file = tmp_path / "chat.yaml"
    kept = {key: values[key] for key in ("model_name_or_path", "template")}
    run_file.write_text(yaml.safe_dump(kept), "utf-8")
    command = [sys.executable, "-m", "luthier", "webchat", str(run_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("ready: http://127.0.0.1:")
            with httpx.Client(follow_redirects=True, timeout=60) as client:
                page = client.get(line.removeprefix("ready: ").strip())
                assert page.status_code == 200 and kept["model_name_or_path"] in page.text
                assert client.get(str(page.url.join("/new"))).status_code == 404
        finally:
            process.kill()

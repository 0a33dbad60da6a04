"""Every page answers, and the board's process loads no torch."""

import subprocess
import sys

CODE = """
import sys
from pathlib import Path
from starlette.testclient import TestClient
from luthier.webui.app import build
from luthier.webui.board import Board

root = Path(sys.argv[1])
with TestClient(build(Board(root))) as client:
    addresses = ["/", "/new", "/new?file=run.yaml", "/new?file=../../etc/passwd", "/run/saves/one", "/run/absent"]
    for path in [*addresses, "/chat", "/data", "/export"]:
        answer = client.get(path)
        print(path, answer.status_code, "root:x:0" in answer.text)
    print(client.get("/compare?run=saves/one&run=../..").status_code)
print(sorted({"torch", "transformers", "datasets", "pyarrow", "numpy"} & set(sys.modules)))
"""


def test_every_page_answers_without_torch(tmp_path):
    folder = tmp_path / "saves" / "one"
    folder.mkdir(parents=True)
    (folder / "trainer_log.jsonl").write_text('{"current_steps": 1, "total_steps": 2, "loss": 1.5}\n', "utf-8")
    (tmp_path / "run.yaml").write_text("stage: sft\nmodel_name_or_path: nowhere\n", "utf-8")
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *pages, compared, heavy = done.stdout.splitlines()
    assert len(pages) == 9 and all(line.endswith(" 200 False") for line in pages)
    assert (compared, heavy) == ("200", "[]")

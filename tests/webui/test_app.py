"""Every page answers, and the board's process loads no torch."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from pathlib import Path
from starlette.testclient import TestClient
from luthier.webui.app import build
from luthier.webui.board import Board

root = Path(sys.argv[1])
with TestClient(build(Board(root))) as client:
    addresses = ["/", "/new", "/new?file=run.yaml", "/new?file=../../etc/passwd", "/run/saves/one", "/run/absent"]
    broken = [f"/run/saves/{name}" for name in ("half", "dead", "elsewhere")]
    odd = ["a%00b", "a" * 300, "a" * 5000, "~nobody", "%ff"]
    asked = ("/run/", "/new?file=", "/export?model=", "/evaluate?model=", "/compare?run=", "/chat?model=")
    print({client.get(address + name).status_code for address in asked for name in odd})
    for path in [*addresses, *broken, "/compare?run=saves/half&run=saves/dead", "/chat", "/data", "/export"]:
        answer = client.get(path)
        print(path, answer.status_code, "root:x:0" in answer.text)
    print(client.get("/compare?run=saves/one&run=../..").status_code)
print(sorted({"torch", "transformers", "datasets", "pyarrow", "numpy"} & set(sys.modules)))
"""


def broken_runs(saves: Path) -> None:
    """Killed while it wrote, dead before its first step, and on another machine."""
    for name in ("half", "dead", "elsewhere"):
        (saves / name).mkdir()
    (saves / "half" / "board.json").write_text('{"pid": 1, "ho', "utf-8")
    (saves / "half" / "board.yaml").write_text("stage: [", "utf-8")
    (saves / "half" / "all_results.json").write_text("[1", "utf-8")
    (saves / "half" / "trainer_log.jsonl").write_text('{"current_steps": 1, "loss": 2.0}\n{"current_st', "utf-8")
    (saves / os.fsdecode(b"caf\xe9")).mkdir()
    (saves / os.fsdecode(b"caf\xe9") / "board.yaml").write_text("model_name_or_path: m\n", "utf-8")
    (saves / "half" / "exit.json").write_text(f'{{"ended": {"1" * 400}}}', "utf-8")
    (saves / "dead" / "board.yaml").mkdir()
    (saves / "dead" / "exit.json").write_text('{"status": "one"}', "utf-8")
    (saves / "dead" / "trainer_log.jsonl").mkdir()
    (saves / "elsewhere" / "board.json").write_text('{"pid": 1, "mark": "a", "host": "elsewhere"}', "utf-8")


def test_every_page_answers_without_torch(tmp_path):
    folder = tmp_path / "saves" / "one"
    folder.mkdir(parents=True)
    (folder / "trainer_log.jsonl").write_text('{"current_steps": 1, "total_steps": 2, "loss": 1.5}\n', "utf-8")
    broken_runs(tmp_path / "saves")
    (tmp_path / "run.yaml").write_text("stage: sft\nmodel_name_or_path: nowhere\n", "utf-8")
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    odd, *pages, compared, heavy = done.stdout.splitlines()
    assert len(pages) == 13 and all(line.endswith(" 200 False") for line in pages)
    assert (odd, compared, heavy) == ("{200}", "200", "[]")

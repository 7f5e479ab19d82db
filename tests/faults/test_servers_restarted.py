"""A served reward that is killed again and again in mid-run changes no number."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest
from command_line import start
from served import serving

MOST_KILLS = 10
PATIENCE = 120  # seconds a step may take


@pytest.mark.timeout(600)
def test_restarts_in_mid_run_leave_the_numbers_of_a_reward_in_the_run(warm, tiny, tmp_path, request):
    draw = random.Random(request.config.getoption("--fault-seed"))
    changes = {"training_steps": 40, "evaluation": {"every": 3, "images": 4, "rewards": []}}
    metrics = tmp_path / "far" / "tiny" / "main" / "seed-0" / "metrics.jsonl"

    def rows() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else -1

    with serving("--port", 0) as first:
        port, kills = first.port, 0
        far = {"kind": "remote", "name": "far", "url": f"http://127.0.0.1:{port}", "micro_batch": 2}
        far |= {"timeout": 20, "retries": 30, "backoff": 0.5}
        (tmp_path / "far.yaml").write_text(json.dumps(tiny | changes | {"rewards": [far]}))
        run = start("run", "far.yaml", "--out", "far", "--no-report", folder=tmp_path)
        first.process.kill()
    while run.poll() is None and kills < MOST_KILLS:
        with serving("--port", port) as server:
            begin, done = time.monotonic(), rows()
            while run.poll() is None and time.monotonic() - begin < PATIENCE and rows() <= done:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.4))
            server.process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
            server.process.wait()
            kills += run.poll() is None
            time.sleep(draw.uniform(0, 1))
    with serving("--port", port):
        text = run.communicate(timeout=300)[0]
    assert run.returncode == 0, text
    assert kills > 2

    near = tiny | changes | {"rewards": [{"kind": "palette", "name": "far"}]}
    (tmp_path / "near.yaml").write_text(json.dumps(near))
    assert warm(["run", "near.yaml", "--out", "near", "--no-report"], tmp_path, seconds=300).code == 0
    assert scores(tmp_path / "far") == scores(tmp_path / "near")


def scores(folder) -> tuple[list, list]:
    found = folder / "tiny" / "main" / "seed-0"
    steps = [json.loads(line)["metrics"]["reward"] for line in (found / "metrics.jsonl").open()]
    evaluations = [json.loads(line)["scores"] for line in (found / "evaluations.jsonl").open()]
    return steps, evaluations

"""The interpreter that forks says what a process of its own would say."""

from __future__ import annotations


def test_a_run_in_a_fork_finishes_and_a_mistake_in_a_fork_is_exit_code_2(warm, write_experiment, tmp_path):
    path = write_experiment()
    done = warm(["run", path, "--out", "runs", "--no-report"], tmp_path)
    assert done.code == 0, done.out
    assert (tmp_path / "runs" / "tiny" / "main" / "seed-0" / "finished.json").exists()
    refused = warm(["check", path, "--set", "training_steps=-1"], tmp_path)
    assert (refused.code, refused.traceback) == (2, False)
    assert "training_steps" in refused.error


def test_what_takes_too_long_hangs_and_is_killed(warm, tmp_path):
    plugin = tmp_path / "sleeper.py"
    plugin.write_text("while True: pass\n")
    assert warm(["plugins", "--plugin", plugin], tmp_path, seconds=2).hangs

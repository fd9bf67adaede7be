"""tools/share.py and runs on the hub: a shared copy acts as the run and holds nothing else; the hub is a fake."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

import flm_train
import fmlm_distill
import ogpo_state as og
from baselines import qc
from common import checkpoint, cli, record
from common.download import obtain_run
from common.errors import UserError
from common.policy import load_policy
from common.start import with_folders
from common.text_run import load_averaged
from tests.helpers import new_agent, perturbed
from tests.test_policy import save_run
from tools import share

OBS = np.random.default_rng(0).normal(size=(6, 6))


def trained(folder: Path) -> Path:
    """A run of the toy task, with a path and an optimizer's state in its checkpoint, and its cloned policy."""
    agent, _ = save_run(folder, obs_dim=6, data_dir="/home/somebody/data", cloned="/home/somebody/runs/first")
    agent.actor_opt.zero_grad()
    agent.actor(torch.zeros(1, 6), torch.zeros(1, 8), torch.zeros(1, 32)).sum().backward()
    agent.actor_opt.step()
    state = checkpoint.load(folder / "checkpoint.pt")
    state["agent"]["actor_opt"] = agent.actor_opt.state_dict()
    checkpoint.save(folder / "checkpoint.pt", state | {"buffer": torch.ones(1_000, 100)})
    checkpoint.save(folder / "cloned.pt", agent.actor.state_dict())
    return folder


def test_shared_copy_acts_as_its_run_and_names_no_place_of_this_machine(tmp_path: Path) -> None:
    run, copy = trained(tmp_path / "run"), tmp_path / "new" / "copy"
    share.main([str(run), str(copy)])
    assert {file.name for file in copy.iterdir()} == {"LICENSE", "README.md", "args.json", "checkpoint.pt", "cloned.pt"}
    for which in ("acting", "noise-free"):
        policies = (load_policy(folder, which, device="cpu", seed=3) for folder in (run, copy))
        np.testing.assert_array_equal(*(policy.chunks(OBS) for policy in policies))
    state = checkpoint.load(copy / "checkpoint.pt")
    agent = state["agent"]
    assert "buffer" not in state and not agent["actor_opt"]
    assert agent["critic"]["weights.0"].data_ptr() == agent["critic_ema"]["weights.0"].data_ptr()
    assert state["args"]["data_dir"] == "data" and state["args"]["cloned"] == "first"
    assert "somebody" not in (copy / "args.json").read_text() + (copy / "README.md").read_text()


def test_shared_copy_keeps_the_critic_that_acts(tmp_path: Path) -> None:
    """QC's candidates are chosen by the critics, not by their slow copies."""
    agent, args = new_agent(qc)
    for net in (agent.actor, agent.critic, agent.critic_ema):
        perturbed(net, 0.2)
    agent.best_of_n_on = True
    (tmp_path / "run").mkdir()
    state = {"step": 1, "args": cli.flatten(args), "agent": checkpoint.pack(agent)}
    checkpoint.save(tmp_path / "run" / "checkpoint.pt", state)
    made = {"script": "qc.py", "definitions": record.definitions((qc.VelocityNet, qc.CriticEnsemble))}
    (tmp_path / "run" / "args.json").write_text(json.dumps(made))
    share.main([str(tmp_path / "run"), str(tmp_path / "copy")])
    one, other = (load_policy(tmp_path / name, device="cpu", seed=3) for name in ("run", "copy"))
    np.testing.assert_array_equal(one.chunks(OBS[:, :5]), other.chunks(OBS[:, :5]))


def test_shared_copy_is_evaluated_starts_runs_and_is_not_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    share.main([str(trained(tmp_path / "run")), str(copy)])
    filmed = []
    monkeypatch.setattr("common.run.record_video", lambda env, act, path, seeds, encode: filmed.append(path))
    for folder in ("run", "copy"):
        og.main(["--eval", folder, "--eval-episodes", "3"])
    assert filmed == [Path("run/after.mp4"), Path("copy/after.mp4")]
    out, kept = capsys.readouterr().out, json.loads((copy / "evaluation.json").read_text())
    assert kept == json.loads(Path("run/evaluation.json").read_text())
    assert (kept["step"], kept["seeds"], set(kept["policies"])) == (1, "final", {"ode", "bon"})
    for result in kept["policies"].values():
        assert result["episodes"] == 3
        rate, (low, high), length = result["successes"] / 3, result["interval"], result["mean_length"]
        assert f"success {rate:.2f} [{low:.2f}, {high:.2f}] over 3 episodes, mean length {length:.1f}" in out
    share.main(["run", "again"])
    assert "| best-of-N policy |" in Path("again/README.md").read_text()
    with pytest.raises(UserError, match=r"--resume copy: .* optimizers and replay buffer are missing; --eval it"):
        og.main(["--resume", "copy"])
    net = og.Agent(og.default_args("toy"), 6, 2, torch.device("cpu"), None).actor
    with pytest.raises(UserError, match="does not fit"):  # it is read: of smaller layers
        og.load_clone(copy, net, {"env": "toy"})


def test_shared_language_model_is_the_averaged_network_and_half_is_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = cli.override(flm_train.default_args("toy"), dict(layers=1, width=32))
    net = flm_train.DiT(args.model, 50)
    state = {"version": 2, "step": 7, "args": cli.flatten(args), "encoding": "0" * 64, "log": 0}
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "checkpoint.pt", state | {"net": net.state_dict(), "ema": net.state_dict()})
    parts = ("DiT", "Clock", "EmbeddingSpace", "OneHotSpace", "interpolant")
    made = {"script": "flm_train.py", "definitions": record.definitions([getattr(flm_train, name) for name in parts])}
    (tmp_path / "run" / "args.json").write_text(json.dumps(made))
    (tmp_path / "run" / "evaluation_ngram.md").write_text("| text | perplexity |\n")
    monkeypatch.chdir(tmp_path)
    sizes, other = [], flm_train.DiT(args.model, 50)
    data: Any = type("Data", (), {"tokenizer": type("Tokenizer", (), {"sha256": "0" * 64})})
    for name, flags in (("whole", []), ("half", ["--half"])):
        share.main(["run", name, *flags])
        saved = checkpoint.load(Path(name, "checkpoint.pt"))
        assert saved.keys() == {"version", "step", "args", "encoding", "ema", "shared"}
        load_averaged(other, saved, data, name)
        for key, value in net.state_dict().items():
            torch.testing.assert_close(other.state_dict()[key], value, rtol=0 if name == "whole" else 2**-8, atol=0)
        sizes.append(sum(value.nbytes for value in saved["ema"].values()))
        assert fmlm_distill.default_args(teacher=name).model.width == 32
    assert sizes[1] < 0.51 * sizes[0]
    cards = [Path(name, "README.md").read_text() for name in ("whole", "half")]
    assert all("Judge ngram:\n\n| text | perplexity |" in card for card in cards)
    assert ["bfloat16" in card for card in cards] == [False, True]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["run"], "give a FOLDER to write, or --push owner/name"),
        (["run", "copy", "--private"], "--private is for --push"),
        (["run", "run"], "run is there already"),
        (["run", "copy", "--half"], "--half is for language models"),
        (["nowhere", "copy"], "nowhere: there is no such folder"),
    ],
)
def test_share_refuses_in_one_line(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    with pytest.raises(UserError, match=said) as caught:
        share.main(flags)
    assert "\n" not in str(caught.value) and {file.name for file in tmp_path.iterdir()} == {"run"}


# --- A hub ------------------------------------------------------------------------------------------------------------

SHA = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """Model repositories of small files at one commit; the token `good` may write."""

    asked: list[str]
    files: dict[str, dict[str, bytes]]  # by repository and path
    shown: dict[str, str | None]  # the visibility asked for, by repository

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        if self.headers["Authorization"] != "Bearer good":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{constants.ENDPOINT}/{repository}"}
            if repository in self.files:
                return self.answer(url | {"error": "You already created this model repo"}, 409)
            self.files[repository], self.shown[repository] = {}, asked.get("visibility")
            return self.answer(url)
        if self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if found := re.fullmatch(r"/api/models/(\w+/\w+)/commit/main", self.path):
            lines = map(json.loads, body.splitlines())
            added = [line["value"] for line in lines if line["key"] == "file"]
            self.files[found[1]] |= {file["path"]: base64.b64decode(file["content"]) for file in added}
            return self.answer({"success": True, "commitOid": SHA, "commitUrl": f"{constants.ENDPOINT}/{found[1]}"})
        return self.answer({"errors": [], "warnings": []})  # of the card's header

    def do_GET(self) -> None:
        self.asked.append(self.path)
        found = re.fullmatch(r"/api/models/(\w+/\w+)", self.path)
        if found and found[1] in self.shown:
            return self.answer({"id": found[1], "private": self.shown[found[1]] == "private"})
        found = re.match(r"/(?:api/models/)?(\w+/\w+)/(revision|tree|resolve)/(\w+)(?:/([\w.]+))?", self.path)
        files = self.files.get(found[1]) if found and found[3] in ("main", SHA) else None
        if files is None:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if found[2] == "revision":
            return self.answer({"id": found[1], "sha": SHA, "siblings": []})
        if found[2] == "tree":
            return self.answer([{"type": "file", "path": k, "size": len(v), "oid": k} for k, v in files.items()])
        content = files[found[4]]
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"asked": [], "files": {}, "shown": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.chdir(tmp_path)
    yield handler
    server.shutdown()
    server.server_close()


def test_pushed_run_is_read_from_the_hub_once(hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    share.main([str(trained(Path("run"))), "--push", "owner/name", "--private"])
    files = hub.files["owner/name"]
    assert hub.shown["owner/name"] == "private"
    assert files.keys() == {"LICENSE", "README.md", "args.json", "checkpoint.pt", "cloned.pt"}
    assert b"--eval hf://owner/name" in files["README.md"]
    files["evil.py"] = b"print()"
    copies = [load_policy(run, device="cpu", seed=3).chunks(OBS) for run in ("run", "hf://owner/name")]
    np.testing.assert_array_equal(*copies)
    folder = Path("data/hub/owner/name")
    assert {file.name for file in folder.glob("*.*")} - {".cache"} == {"args.json", "checkpoint.pt", "cloned.pt"}
    asked = len(hub.asked)
    og.main(["--eval=hf://owner/name", "--eval-episodes", "2", "--no-video"])
    assert len(hub.asked) == asked and (folder / "evaluation.json").exists()
    assert capsys.readouterr().out.count("hf://owner/name is now in data/hub/owner/name") == 1


def test_with_folders_replaces_runs_on_the_hub_alone(hub: type[Hub]) -> None:
    hub.files["owner/name"] = {"args.json": b"{}", "checkpoint.pt": b""}
    given = [
        "--teacher",
        f"hf://owner/name@{SHA}",
        "--cloned=hf://owner/name",
        "--data",
        "owner/name",
        "--data-dir",
        "d",
    ]
    folders = ["--teacher", f"d/hub/owner/name@{SHA}", "--cloned=d/hub/owner/name", "--data", "owner/name"]
    assert with_folders(given) == [*folders, "--data-dir", "d"]
    assert Path(f"d/hub/owner/name@{SHA}/args.json").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf://owner", "is no address of a run on the hub; give hf://owner/name"),
        ("hf://../name", "is no address of a run on the hub"),
        ("hf://owner/gone", r"cannot download hf://owner/gone \(404 .*\); check the name"),
        ("hf://owner/other", "is no run: it has no checkpoint.pt"),
    ],
)
def test_obtain_run_says_in_one_line_why_there_is_none(hub: type[Hub], name: str, said: str) -> None:
    hub.files["owner/other"] = {"args.json": b"{}"}
    with pytest.raises(UserError, match=said) as caught:
        obtain_run(name, Path("data"))
    assert "\n" not in str(caught.value) and not [p for p in Path("data").rglob("*") if p.name[0] != "."][2:]


def test_push_and_download_say_in_one_line_what_the_hub_refuses(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(Path("run"))

    def refused(*flags: str) -> str:
        with pytest.raises(UserError) as caught:
            share.main(["run", *flags])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    share.main(["run", "--push", "owner/open"])
    assert hub.shown["owner/open"] is None  # as the owner has it for new ones
    assert "is there already and public" in refused("--push", "owner/open", "--private")
    assert "give owner/name" in refused("--push", "a b")
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert "401" in refused("--push", "owner/name")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login, or set HF_TOKEN" in refused("--push", "owner/name")
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "cannot push to owner/name" in refused("--push", "owner/name")
    with pytest.raises(UserError, match="cannot download hf://owner/name") as caught:
        obtain_run("hf://owner/name", Path("data"))
    assert "\n" not in str(caught.value) and "check the name, the network" in str(caught.value)

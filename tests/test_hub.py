# SPDX-License-Identifier: MIT
"""Models in folders, on the model hub, in other processes, and by ``torch.hub``."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import thin
import torch
from conftest import REPOSITORY
from place_data import SMALL, picture

from patchnetvlad import PlaceModel, load_model
from patchnetvlad.datasets.images import input_transform
from patchnetvlad.errors import AssetError, CheckpointError, ConfigError

pytestmark = pytest.mark.usefixtures("thin_network")


@pytest.fixture(scope="module")
def model():
    return load_model(SMALL, device="cpu")


@pytest.fixture
def own(tmp_path):
    """A model with a checkpoint of its own, as training writes it."""
    file = tmp_path / "own.pth.tar"
    torch.save({"state_dict": thin.state()}, file)
    return load_model(SMALL, weights=file, device="cpu")


def same(model, other):
    a, b = (m.describe(picture(3)) for m in (model, other))
    # Products round by how the weights lie in memory, which the file's format decides.
    np.testing.assert_allclose(a.descriptor, b.descriptor, atol=2e-6)
    for ours, theirs in zip(a.patches, b.patches, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


class TestCopies:
    @pytest.mark.parametrize(
        "through", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
    )
    def test_describe_alike(self, model, through):
        same(model, through(model))

    def test_a_pickle_holds_no_weights(self, model):
        assert len(pickle.dumps(model)) < 10_000

    def test_other_weights_in_the_same_file_are_noticed(self, own):
        pickled = pickle.dumps(own)
        state = thin.state()
        state["WPCA.0.bias"] += 1
        torch.save({"state_dict": state}, own.config.resume_path)
        with pytest.raises(CheckpointError, match=r"own\.pth\.tar "):
            pickle.loads(pickled)


class TestFolders:
    def test_saved_and_loaded(self, own, tmp_path):
        own.save_pretrained(tmp_path / "mine")
        loaded = PlaceModel.from_pretrained(tmp_path / "mine", device="cpu")
        assert replace(loaded.config, resume_path="") == replace(own.config, resume_path="")
        same(own, loaded)
        card = (tmp_path / "mine" / "README.md").read_text()
        assert "library_name: patchnetvlad" in card
        assert "PlaceModel.from_pretrained(" in card

    def test_safetensors_are_copied(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        assert PlaceModel.from_pretrained(tmp_path, device="cpu").checkpoint == model.checkpoint

    def test_a_loaded_model_can_be_saved_over_itself(self, own, tmp_path):
        own.save_pretrained(tmp_path / "mine")
        loaded = PlaceModel.from_pretrained(tmp_path / "mine", device="cpu")
        loaded.save_pretrained(tmp_path / "mine")
        same(own, PlaceModel.from_pretrained(tmp_path / "mine", device="cpu"))

    def test_paths_of_this_machine_are_not_saved(self, own, tmp_path):
        config = replace(own.config, faiss_index_path=str(tmp_path / "places.faiss"))
        load_model(config, device="cpu").save_pretrained(tmp_path / "mine")
        assert str(tmp_path) not in (tmp_path / "mine" / "config.json").read_text()

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            (None, AssetError),
            ("{", AssetError),
            ("[1]", AssetError),
            ('{"pooling": "most"}', ConfigError),
            ('{"num_pcs": "many"}', ConfigError),
        ],
    )
    def test_other_folders_are_refused_by_name(self, own, tmp_path, text, kind):
        folder = tmp_path / "mine"
        own.save_pretrained(folder)
        (folder / "config.json").unlink()
        if text is not None:
            (folder / "config.json").write_text(text)
        with pytest.raises(kind, match=rf"{folder}\b"):
            PlaceModel.from_pretrained(folder)

    def test_damaged_weights_are_refused(self, own, tmp_path):
        own.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match=r"/model\.safetensors "):
            PlaceModel.from_pretrained(tmp_path)


@pytest.fixture
def hub(own, tmp_path):
    """A hub on this machine with one repository, ``someone/places``."""
    own.save_pretrained(tmp_path / "repository")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def do_GET(self):
            file = tmp_path / "repository" / Path(self.path).name
            found = self.path.startswith("/someone/places/resolve/main/") and file.is_file()
            body = file.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            if not found:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_fetched_from_the_hub_then_offline(hub, own, tmp_path):
    code = thin.IN_A_PROCESS + (
        "import numpy as np\n"
        "from place_data import picture\n"
        "from patchnetvlad import PatchNetVLADError, PlaceModel\n"
        "try:\n"
        "    PlaceModel.from_pretrained('someone/nothing', device='cpu')\n"
        "except PatchNetVLADError as error:\n"
        "    print(type(error).__name__, 'someone/nothing' in str(error))\n"
        "for offline in (False, True):\n"
        "    model = PlaceModel.from_pretrained(\n"
        "        'someone/places', device='cpu', local_files_only=offline)\n"
        "    np.save(sys.argv[1], model.describe(picture(3)).descriptor)\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "row.npy")],
        env=environment, cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["AssetError", "True"]
    expected = own.describe(picture(3)).descriptor
    np.testing.assert_allclose(np.load(tmp_path / "row.npy"), expected, atol=2e-6)


class TestTorchHub:
    def test_the_whole_method(self, model):
        loaded = torch.hub.load(str(REPOSITORY), "patchnetvlad", "demo", source="local")
        assert isinstance(loaded, PlaceModel)
        assert loaded.checkpoint == model.checkpoint

    def test_global_descriptors_alone(self, model):
        entry = torch.hub.load(str(REPOSITORY), "netvlad", "demo", "cpu", source="local")
        assert isinstance(entry, torch.nn.Module)
        image = picture(3)
        batch = torch.stack([input_transform((0, 0))(image)] * 2)
        descriptors = entry(batch)
        assert descriptors.shape == (2, 128)
        np.testing.assert_allclose(descriptors[0], model.describe(image).descriptor, atol=1e-6)


def test_config_json_says_all_that_decides_on_descriptors(own, tmp_path):
    own.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["patch_sizes"] == [2, 3]
    assert content["num_pcs"] == 128

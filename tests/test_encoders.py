# SPDX-License-Identifier: MIT
"""Encoders other than VGG16: geometry, weights, and every command with them."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from place_data import picture, write_list
from torch import nn

from patchnetvlad import Config, PlaceIndex, load_model, match
from patchnetvlad.assets.checkpoints import download_weights
from patchnetvlad.cli import add_pca, feature_extract, feature_match, fit, match_two, store, train
from patchnetvlad.encoders import DEFAULT, ENCODERS
from patchnetvlad.engines.readers import patch_readers
from patchnetvlad.errors import (
    ArgumentError,
    AssetError,
    CheckpointError,
    ConfigError,
    FeatureError,
)
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.open import open_reader
from patchnetvlad.models.backbones import encoder_state, weights_url
from patchnetvlad.models.checkpoint import (
    encoder_named,
    load_network,
    load_state,
    model_from_state,
    save_safetensors,
)
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.grid import PatchGrid, patch_grids
from patchnetvlad.training import loop
from patchnetvlad.training.files import load_weights

COUNT = 8
TRIED = ("resnet50", "dinov2_vits14")
OTHERS = tuple(name for name in ENCODERS if name != DEFAULT)

INI = """
[feature_extract]
cachebatchsize = 4
imageresizeW = 128
imageresizeH = 96
[feature_match]
matcher = RANSAC
n_values_all = 1,5
imageresizeW = 128
imageresizeH = 96
patchWeights2Use = 0.5,0.5
[global_params]
pooling = patchnetvlad
resumePath = {checkpoint}
num_pcs = 8
patch_sizes = 2,3
strides = 1,1
{encoder}
[train]
batchsize = 8
num_clusters = 4
nNeg = 1
imageresizeW = 64
imageresizeH = 64
posdistthr = 1
negdistthr = 2
valdistthr = 1
evalevery = 5
margin = 9
"""


@functools.cache
def built(name):
    """An encoder with random weights in evaluation; not to be changed."""
    torch.manual_seed(1)
    return encoder_named(name).eval().requires_grad_(False)


@functools.cache
def network_state(name):
    """The state of a whole network with random weights, of 2 clusters and 8 components."""
    d = ENCODERS[name].channels
    random = torch.Generator().manual_seed(2)
    state = {f"encoder.{key}": value for key, value in built(name).state_dict().items()}
    centroids = torch.randn(2, d, generator=random)
    return state | {
        "pool.centroids": centroids,
        "pool.conv.weight": centroids[:, :, None, None],
        "WPCA.0.weight": torch.randn(8, 2 * d, 1, 1, generator=random),
        "WPCA.0.bias": torch.zeros(8),
    }


# Geometry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [(480, 640), (97, 131), (112, 111)])
def test_maps_have_the_shape_that_geometry_says(name, size):
    geometry = ENCODERS[name]
    with torch.device("meta"):
        shape = encoder_named(name)(torch.empty(1, 3, *size)).shape
    assert shape == (1, geometry.channels, *geometry.map_shape(size))


def even(name):
    """An encoder whose cells weigh what they see by symmetric kernels, without attention."""
    encoder = encoder_named(name).eval()
    if name.startswith("dinov2"):  # blocks add nothing, so that a token is that of its patch
        for block in encoder.vit.blocks:
            block.ls1.gamma.data.zero_()
            block.ls2.gamma.data.zero_()
        return encoder
    for module in list(encoder.modules()):
        if isinstance(module, nn.Conv2d):
            module.weight.data.fill_(1 / module.weight[0].numel())
        for child, layer in module.named_children():
            if isinstance(layer, nn.MaxPool2d):
                pool = nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding)
                setattr(module, child, pool)
    return encoder


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet50", "dinov2_vits14"])
def test_cells_see_the_pixels_that_geometry_says(name):
    geometry = ENCODERS[name]
    side = geometry.receptive_field + 2 * geometry.cell
    image = torch.rand(1, 3, side, side + geometry.cell, requires_grad=True)
    row, column = (cells // 2 for cells in geometry.map_shape(image.shape[2:]))
    even(name)(image)[0, 0, row, column].backward()
    seen = image.grad[0].abs().sum(dim=0)  # [H, W]
    for cell, weights in ((row, seen.sum(dim=1)), (column, seen.sum(dim=0))):
        first, *_, last = weights.nonzero().flatten().tolist()
        low = geometry.cell * cell - geometry.padding
        assert (first, last) == (low, low + geometry.receptive_field - 1)
        middle = geometry.centre + geometry.cell * cell
        assert middle == (first + last) / 2
        if not name.startswith("dinov2"):
            weights = weights.double() / weights.double().sum()
            centroid = weights @ torch.arange(len(weights)).double()
            assert centroid == pytest.approx(middle, abs=1e-3)
    grid = PatchGrid.of_map(geometry.map_shape(image.shape[2:]), 1, 1, geometry)
    found = grid.keypoints[row * (grid.indices[-1, 0] + 1) + column]
    expected = [geometry.centre + geometry.cell * cell for cell in (column, row)]
    assert found.tolist() == [int(value) for value in expected]


@pytest.mark.parametrize("name", ENCODERS)
def test_key_points_are_in_the_middle_of_the_cells(name):
    geometry = ENCODERS[name]
    (grid,) = patch_grids((112, 140), (3,), (2,), geometry)
    first, second = grid.centres[:2]
    assert first.tolist() == [geometry.centre + geometry.cell] * 2  # the second of three cells
    assert (second - first).tolist() == [2 * geometry.cell, 0]
    assert grid.step == 2 * geometry.cell
    np.testing.assert_array_equal(grid.keypoints, np.floor(grid.centres))


def test_a_transformer_does_not_see_beyond_the_last_whole_patch():
    encoder = built("dinov2_vits14")
    images = torch.randn(1, 3, 60, 75)
    changed = images.clone()
    changed[:, :, 56:] = changed[:, :, :, 70:] = 9
    assert torch.equal(encoder(images), encoder(changed))
    changed[:, :, 55, 69] = 9
    assert not torch.equal(encoder(images), encoder(changed))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_trained(name):
    with torch.device("meta"):
        encoder = encoder_named(name)
    loop.freeze(encoder)
    trained = {key for key, value in encoder.named_parameters() if value.requires_grad}
    if name.startswith("resnet"):
        assert trained
        assert all(key.startswith("layer3.") for key in trained)
    else:
        assert {key.rpartition(".")[0].split(".", 2)[1] for key in trained} == {"blocks", "norm"}
        assert {key.split(".")[2] for key in trained if "blocks" in key} == {"11"}


# Which checkpoint fits ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "dinov2_vits14"])
def test_other_checkpoints_are_refused(name):
    for other in (DEFAULT, *TRIED):
        config = Config(encoder=other, num_pcs=8, source="my.ini")
        if other == name:
            assert model_from_state(config, network_state(name)).pool.dim == ENCODERS[name].channels
            continue
        with pytest.raises(CheckpointError, match=rf"my\.pth.*\b{name}\b.*my\.ini.*\b{other}\b"):
            model_from_state(config, network_state(name), source="my.pth")


def test_an_encoder_of_another_depth_is_refused():
    config = Config(encoder="resnet50", num_pcs=8)
    deeper = network_state("resnet50") | {"encoder.layer3.6.conv1.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"my\.pth.*encoder\.layer3\.6\.conv1\.weight"):
        model_from_state(config, deeper, source="my.pth")
    wide = {"encoder.vit.patch_embed.proj.weight": torch.zeros(1024, 3, 14, 14)}
    with pytest.raises(CheckpointError, match=r"my\.pth.*1024"):
        model_from_state(replace(config, encoder="dinov2_vits14"), wide, source="my.pth")


def test_settings():
    with pytest.raises(ConfigError, match=r"resnet5\b.*'resnet50'"):
        Config(encoder="resnet5")
    assert Config(encoder="dinov2_vits14").min_image_side == 14 * 8
    assert Config().min_image_side == 16 * 8


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArgumentError, match=r"timm.*patchnetvlad\[encoders\]"):
        load_weights("dinov2_vits14")


def test_the_record_of_vgg16_is_that_of_older_versions():
    manifest = Manifest.of(Config(), ["a.png"], "0" * 64)
    assert "encoder" not in json.loads(manifest.to_json())
    assert Manifest.from_json(manifest.to_json(), "x") == manifest
    other = Manifest.of(Config(encoder="resnet50"), ["a.png"], "0" * 64)
    assert Manifest.from_json(other.to_json(), "x") == other
    assert other.differences(manifest) == ["encoder: resnet50 -> vgg16"]
    assert other.patch_counts() == {2: 1131, 5: 936, 8: 759}


# Published weights -------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the files in a folder; gives the folder and the URL."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("PATCHNETVLAD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    serve = functools.partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as http:
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def publish(folder, state, name):
    """Write weights as PyTorch publishes them, with a part of their SHA-256 in the name."""
    torch.save(state, folder / "plain.pth")
    digest = hashlib.sha256((folder / "plain.pth").read_bytes()).hexdigest()[:8]
    return (folder / "plain.pth").rename(folder / f"{name}-{digest}.pth")


def torchvision_state(name):
    state = {key: value.clone() for key, value in built(name).state_dict().items()}
    return state | {"bn1.num_batches_tracked": torch.tensor(3), "fc.weight": torch.zeros(9, 9),
                    "layer4.0.conv1.weight": torch.zeros(1)}  # fmt: skip


def test_weights_are_downloaded_once_and_verified(server, tmp_path, monkeypatch):
    folder, url = server
    file = publish(folder, torchvision_state("resnet18"), "resnet18")
    monkeypatch.setattr(
        "patchnetvlad.training.files.weights_url", lambda name: f"{url}/{file.name}"
    )
    state, path = load_weights("resnet18")
    assert path == tmp_path / "home" / "pretrained_models" / file.name
    assert set(state) == {f"encoder.{key}" for key in built("resnet18").state_dict()}
    assert torch.equal(state["encoder.conv1.weight"], built("resnet18").conv1.weight)
    before = path.stat().st_mtime_ns
    file.write_bytes(b"other")
    assert load_weights("resnet18")[1] == path
    assert path.stat().st_mtime_ns == before
    assert [child.name for child in path.parent.iterdir()] == [file.name]

    path.unlink()
    with pytest.raises(AssetError, match=rf"(?s){file.name}.*sha256.*{url}/{file.name}"):
        load_weights("resnet18")
    assert not path.exists()


def test_weights_that_torch_has_are_taken_from_there(server, tmp_path):
    kept = tmp_path / "torch" / "hub" / "checkpoints" / "some-0123abcd.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"there")
    assert download_weights(f"{server[1]}/{kept.name}") == kept


def test_without_network_nothing_is_made_up(server, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "patchnetvlad.training.files.weights_url", lambda name: f"{server[1]}/x.pth"
    )
    words = ["--images", str(images), "--num_pcs", "8", "--output", str(tmp_path / "a.pth.tar")]
    assert fit.main([*words, "--encoder", "resnet18", "--nocuda"]) == 2
    said = capsys.readouterr().err
    assert f"{server[1]}/x.pth" in said
    assert "--random" in said
    assert not (tmp_path / "a.pth.tar").exists()
    words += ["--random", "--nocuda"]
    assert fit.main([*words, "--encoder", "elsewhere.pth"]) == 2
    assert "elsewhere.pth" in capsys.readouterr().err


@pytest.mark.parametrize("name", OTHERS)
def test_where_weights_are_published(name):
    assert weights_url(name).startswith("https://")
    assert weights_url(name).endswith(".pth")


def test_residual_networks_compute_what_torchvision_does():
    from torchvision.models import resnet18

    torch.manual_seed(3)
    whole = resnet18().eval()
    for key, value in whole.state_dict().items():
        if "running" in key:
            value.uniform_(0.5, 1.5)
    state = encoder_state(whole.state_dict())
    network = model_from_state(Config(encoder="resnet18", pooling="avg", num_pcs=0), state)
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        x = whole.maxpool(whole.relu(whole.bn1(whole.conv1(images))))
        expected = whole.layer3(whole.layer2(whole.layer1(x)))
        torch.testing.assert_close(network.eval().encoder(images), expected, rtol=1e-4, atol=1e-5)


def test_tokens_lie_where_their_patches_are():
    encoder = built("dinov2_vits14")
    images = torch.randn(2, 3, 42, 70)
    tokens = encoder.vit.forward_features(images)[:, 1:]
    found = encoder(images)
    assert found.shape == (2, 384, 3, 5)
    for row, column in ((0, 0), (1, 3), (2, 4)):
        torch.testing.assert_close(found[:, :, row, column], tokens[:, 5 * row + column])


def test_files_of_the_authors_of_dinov2():
    raw = built("dinov2_vits14").vit.state_dict()
    assert set(encoder_state({**raw, "mask_token": torch.zeros(1, 384)})) == {
        f"encoder.{key}" for key in built("dinov2_vits14").state_dict()
    }


# From pictures to places -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pictures, and the same a little blurred as queries, with lists of both."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        image = picture(i, (160, 120))
        image.save(root / f"{i}.png")
        image.filter(ImageFilter.GaussianBlur(1)).save(root / f"q{i}.png")
    write_list(root / "index.txt", [f"{i}.png" for i in range(COUNT)])
    write_list(root / "query.txt", [f"q{i}.png" for i in range(COUNT)])
    write_list(root / "walk.txt", [f"{q}{i}.png" for i in range(COUNT) for q in ("", "q")])
    np.save(root / "positions.npy", np.repeat([[3.0 * i, 0] for i in range(COUNT)], 2, axis=0))
    return root


def write_ini(file, checkpoint, encoder=""):
    line = f"encoder = {encoder}" if encoder else ""
    file.write_text(INI.format(checkpoint=checkpoint, encoder=line))
    return str(file)


@pytest.fixture(scope="module", params=TRIED)
def made(request, images, tmp_path_factory):
    """A checkpoint fitted by the command, a configuration with it, and stored features."""
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = root / "mine_WPCA8.safetensors"
    ini = write_ini(root / "mine.ini", checkpoint, request.param)
    words = ["--images", str(images / "walk.txt"), "--dataset_root_dir", str(images),
             "--config_path", ini, "--encoder", request.param, "--random", "--num_clusters", "4",
             "--num_pcs", "8", "--output", str(checkpoint), "--nocuda"]  # fmt: skip
    assert fit.main(words) == 0
    for part in ("query", "index"):
        words = ["--config_path", ini, "--dataset_file_path", str(images / f"{part}.txt"),
                 "--dataset_root_dir", str(images), "--output_features_dir", str(root / part),
                 "--nocuda"]  # fmt: skip
        assert feature_extract.main(words) == 0
    return request.param, root, ini


def matching(images, root, ini, results):
    return feature_match.main(
        ["--config_path", ini, "--dataset_root_dir", str(images),
         "--query_file_path", str(images / "query.txt"),
         "--index_file_path", str(images / "index.txt"),
         "--query_input_features_dir", str(root / "query"),
         "--index_input_features_dir", str(root / "index"),
         "--result_save_folder", str(results), "--nocuda"]
    )  # fmt: skip


def test_descriptors_fit_the_map(made, images):
    name, root, ini = made
    config = Config.load(ini)
    rows, columns = ENCODERS[name].map_shape((96, 128))
    reader = open_reader(root / "index", [f"{i}.png" for i in range(COUNT)], config, images)
    assert reader.descriptor(3).shape == (8,)
    expected = [((rows - s + 1) * (columns - s + 1), 8) for s in (2, 3)]
    assert [patches.shape for patches in reader.patches(3)] == expected
    card = (root / "mine_WPCA8.md").read_text()
    assert name in card
    assert "random" in card


def test_maps_hold_what_patches_are_made_of(made, images, tmp_path):
    name, root, ini = made
    other = tmp_path / "maps.ini"
    text = Path(ini).read_text().replace("[feature_match]", "local_features = map\n[feature_match]")
    other.write_text(text)
    words = ["--config_path", str(other), "--dataset_file_path", str(images / "index.txt"),
             "--dataset_root_dir", str(images), "--output_features_dir", str(tmp_path / "maps"),
             "--nocuda"]  # fmt: skip
    assert feature_extract.main(words) == 0
    names = [f"{i}.png" for i in range(COUNT)]
    config = Config.load(other)
    maps = open_reader(tmp_path / "maps", names, config, images)
    h, w = ENCODERS[name].map_shape((96, 128))
    assert maps.feature_map(2).shape == (ENCODERS[name].channels, h, w)
    (made_again,) = patch_readers(config, [maps], torch.device("cpu"))
    stored = open_reader(root / "index", names, Config.load(ini), images)
    for again, patches in zip(made_again(2), stored.patches(2), strict=True):
        cosine = (again.float() * torch.as_tensor(patches).float()).sum(dim=1)
        assert cosine.min() > 0.99


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_pooling_without_a_vocabulary(tmp_path, pooling):
    save_safetensors(network_state("resnet18"), tmp_path / "mine.safetensors")
    config = Config(
        encoder="resnet18", pooling=pooling, num_pcs=0, resume_path=str(tmp_path / "mine")
    )
    describer = Describer.load(config, torch.device("cpu"))
    assert (describer.dimension, describer.map_channels) == (256, 256)
    (found,) = describer.describe(torch.randn(1, 3, 64, 64))
    assert found.descriptor.shape == (256,)


def test_matching_finds_the_same_places(made, images, tmp_path):
    _, root, ini = made
    assert matching(images, root, ini, tmp_path) == 0
    lines = (tmp_path / "PatchNetVLAD_predictions.txt").read_text().splitlines()
    pairs = [line.split(", ") for line in lines if not line.startswith("#")]
    first = {}
    for query, index, *_ in pairs:
        first.setdefault(query, index)
    assert len(first) == COUNT
    assert sum(
        query.endswith(f"q{index.rpartition('/')[2]}") for query, index in first.items()
    ) >= (COUNT - 1)


def test_match_two(made, images, tmp_path, capsys):
    _, _, ini = made
    words = ["--config_path", ini, "--first_im_path", str(images / "q1.png"), "--nocuda",
             "--plot_save_path", str(tmp_path)]  # fmt: skip
    scores = []
    for second in ("1.png", "5.png"):
        assert match_two.main([*words, "--second_im_path", str(images / second)]) == 0
        scores.append(float(re.findall(r"\d\.\d{5}", capsys.readouterr().out)[0]))
    assert scores[0] > scores[1]
    with Image.open(tmp_path / "patchMatchings.png") as plot:
        assert plot.size[0] > 1000


def test_place_index(made, images, tmp_path):
    name, _, ini = made
    model = load_model(ini, device="cpu")
    with PlaceIndex(model) as index:
        index.add([images / f"{i}.png" for i in range(COUNT)])
        answer = index.query(images / "q4.png")
        assert str(answer.best.key).endswith("4.png")
        found = match(answer.query, index.description(answer.best.key))
        index.save(tmp_path / "places")
    geometry = ENCODERS[name]
    assert found.query.grids[0].keypoints[0].tolist() == [
        int(geometry.centre + geometry.cell / 2)
    ] * 2  # fmt: skip
    with PlaceIndex.load(tmp_path / "places", model) as again:
        assert str(again.query(images / "q4.png").best.key).endswith("4.png")


def test_stored_features_of_another_encoder_are_refused(made, images, tmp_path, capsys):
    name, root, _ = made
    checkpoint = root / "mine_WPCA8.safetensors"
    ini = write_ini(tmp_path / "other.ini", checkpoint)
    assert matching(images, root, ini, tmp_path) == 2
    said = capsys.readouterr().err
    assert name in said
    assert "other.ini" in said
    model = ["--config_path", ini, "--dataset_file_path", str(images / "index.txt"),
             "--dataset_root_dir", str(images), "--nocuda"]  # fmt: skip
    assert feature_extract.main([*model, "--output_features_dir", str(tmp_path / "new")]) == 2
    assert f"encoder = {name}" in capsys.readouterr().err


def test_small_images_are_refused(made, images, tmp_path, capsys):
    name, _, ini = made
    config = replace(Config.load(ini), image_size=(32, 32), match_image_size=(32, 32))
    side = 3 * ENCODERS[name].cell
    assert config.min_image_side == side > 32
    with pytest.raises(ConfigError, match="patch size 3"):
        patch_grids((32, 32), (3,), (1,), ENCODERS[name])
    small = tmp_path / "small.ini"
    small.write_text(Path(ini).read_text().replace("= 96", "= 32").replace("= 128", "= 32"))
    words = ["--config_path", str(small), "--dataset_file_path", str(images / "index.txt"),
             "--dataset_root_dir", str(images), "--nocuda"]  # fmt: skip
    assert feature_extract.main([*words, "--output_features_dir", str(tmp_path / "f")]) == 2
    assert "patch size 3" in capsys.readouterr().err


def test_store_names_the_encoder(made, capsys):
    name, root, _ = made
    assert store.main(["info", str(root / "index")]) == 0
    assert name in capsys.readouterr().out


def test_training_goes_on_from_it(made, images, tmp_path):
    pytest.importorskip("h5py")
    name, root, ini = made
    start = root / "mine_WPCA8.safetensors"
    save = ["--cache_path", str(tmp_path / "cache"), "--save_path", str(tmp_path / "save")]
    own = ["--images", str(images / "walk.txt"), "--dataset_root_dir", str(images), "--nocuda",
           "--config_path", ini]  # fmt: skip
    words = ["--positions", str(images / "positions.npy"), "--val_share", "0.3", "--cell", "6",
             "--nEpochs", "1", "--weights", str(start)]  # fmt: skip
    assert train.main([*own, *save, *words]) == 0
    assert (tmp_path / "cache" / "centroids" / f"{name}_own_4_desc_cen.hdf5").is_file()
    (epoch,) = tmp_path.rglob("checkpoint.pth.tar")
    before, after = load_state(start), load_state(epoch)
    with torch.device("meta"):
        network = encoder_named(name).requires_grad_(True)
    loop.freeze(network)
    changed = {
        key: not torch.equal(before[f"encoder.{key}"], after[f"encoder.{key}"])
        for key, _ in network.named_parameters()
    }
    trained = {key for key, p in network.named_parameters() if p.requires_grad}
    assert {key for key, differs in changed.items() if differs} <= trained
    assert any(changed.values())

    assert add_pca.main([*own, "--resume_path", str(epoch), "--num_pcs", "6"]) == 0
    whitened = epoch.with_name("checkpoint_WPCA6.pth.tar")
    config = replace(Config.load(ini), resume_path=str(whitened), num_pcs=6)
    assert load_network(config, "cpu").pool.num_clusters == 4
    with pytest.raises(CheckpointError, match=rf"{whitened.name}.*\b{name}\b"):
        load_network(replace(config, encoder=DEFAULT), "cpu")
    resumed = ["--resume_path", str(epoch), "--nEpochs", "2", *words[:6]]
    assert train.main([*own, *save, *resumed]) == 0
    assert load_network(replace(config, resume_path=str(epoch), num_pcs=0), "cpu")
    with pytest.raises(FeatureError):
        open_reader(root / "index", ["0.png"], config, images)

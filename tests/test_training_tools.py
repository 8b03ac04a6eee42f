# SPDX-License-Identifier: MIT
"""``patchnetvlad.training_tools``: the names of the research code, and its numbers."""

from __future__ import annotations

import configparser
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import thin
import torch
from msls_data import write_msls
from torch import nn

from patchnetvlad.config_train import TrainConfig
from patchnetvlad.datasets.images import input_transform
from patchnetvlad.errors import ArgumentError
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.training.clusters import Clusters
from patchnetvlad.training.loop import batch_loss
from patchnetvlad.training.mining import Triplet
from patchnetvlad.training.recipes import TripletBatch
from patchnetvlad.training.schedule import make_optimiser
from patchnetvlad.training_tools.get_clusters import get_clusters
from patchnetvlad.training_tools.msls import MSLS, ImagesFromList, default_cities
from patchnetvlad.training_tools.tools import humanbytes, pca, save_checkpoint
from patchnetvlad.training_tools.train_epoch import train_epoch
from patchnetvlad.training_tools.val import val

SIGNATURES = {
    MSLS: "root_dir, cities='', nNeg=5, transform=None, mode='train', task='im2im', subtask='all', "
    "seq_length=1, posDistThr=10, negDistThr=25, cached_queries=1000, cached_negatives=1000, "
    "positive_sampling=True, bs=24, threads=8, margin=0.1, exclude_panos=True",
    ImagesFromList: "images, transform",
    get_clusters: "cluster_set, model, encoder_dim, device, opt, config",
    train_epoch: "train_dataset, model, optimizer, criterion, encoder_dim, device, epoch_num, opt, "
    "config, writer",
    val: "eval_set, model, encoder_dim, device, opt, config, writer, epoch_num=0, "
    "write_tboard=False, pbar_position=0",
    pca: "x, num_pcs=None, subtract_mean=True",
    humanbytes: "B",
    save_checkpoint: "state, opt, is_best_sofar, filename='checkpoint.pth.tar'",
}

TRANSFORM = input_transform((96, 128))
CPU = torch.device("cpu")


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signature(function):
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert ", ".join(map(str, plain)) == SIGNATURES[function]


# Ten steps of the research code's train_epoch, from these weights, on these triplets, in this
# order: the losses, and of the change of each tensor its length and a projection.
ORDER = [18, 19, 5, 11, 2, 0, 1, 12, 15, 8, 7, 4, 14, 10, 16, 6, 3, 13, 9, 17]
LOSSES = [
    0.3496570587158203, 0.2705652713775635, 0.38130420446395874, 0.28103160858154297,
    0.28962746262550354, 0.37072986364364624, 0.3785513639450073, 0.3420748710632324,
    0.32099324464797974, 0.30967026948928833,
]  # fmt: skip
CHANGES = {
    "encoder.0.weight": (0.5781202748801033, -0.07716757863928755),
    "encoder.0.bias": (0.009304027706719543, 0.003212207515492834),
    "pool.centroids": (0.07919510713736407, -0.016597999824489753),
    "pool.conv.weight": (0.008977474770739055, 0.010462018387058984),
}


def test_ten_steps_as_the_research_code():
    random = np.random.default_rng(0)
    network = nn.Module()
    network.add_module("encoder", nn.Sequential(nn.Conv2d(3, 32, 16, stride=16)))
    network.add_module("pool", NetVLAD(num_clusters=4, dim=32))
    state = network.state_dict()
    for value in state.values():
        value.copy_(torch.from_numpy(0.1 * random.standard_normal(tuple(value.shape))))
    start = {key: value.clone() for key, value in state.items()}

    def images(*shape):
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    sizes = [(3, 48, 64), (3, 48, 64), (2, 3, 48, 64)]
    data = [[images(*size) for size in sizes] for _ in range(20)]
    optimiser = make_optimiser(network, TrainConfig(learning_rate=0.05))
    losses = []
    for first in range(0, 20, 2):
        queries, positives, negatives = zip(
            *(data[i] for i in ORDER[first : first + 2]), strict=True
        )
        batch = torch.cat([torch.stack(queries), torch.stack(positives), torch.cat(negatives)])
        optimiser.zero_grad()
        loss = batch_loss(network, batch, TripletBatch([Triplet(0, 0, (0, 0))] * 2, margin=0.1))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, LOSSES, atol=1e-5)
    random = np.random.default_rng(5)
    for key, expected in CHANGES.items():
        change = (network.state_dict()[key] - start[key]).double().numpy()
        along = random.standard_normal(change.shape)
        found = np.linalg.norm(change), (change * along).sum()
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(write_msls(tmp_path_factory.mktemp("msls"), ("trondheim", "london", "cph")))


@pytest.fixture(scope="module")
def network():
    state = thin.state()
    network = nn.Module()
    network.add_module("encoder", thin.build_encoder())
    network.add_module("pool", NetVLAD(thin.CLUSTERS, 512))
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("WPCA")})
    return network


@pytest.fixture
def sections():
    config = configparser.ConfigParser()
    config["train"] = {
        "batchsize": "3", "cachebatchsize": "4", "margin": "0.1", "num_clusters": "4",
        "imageresizeh": "96", "imageresizew": "128",
    }  # fmt: skip
    config["global_params"] = {"pooling": "netvlad", "num_clusters": "4"}
    return config


class TestMSLS:
    def test_attributes(self, root):
        data = MSLS(root, "trondheim,london")
        assert data.cities == ["trondheim", "london"]
        assert data.qEndPosList == [7, 7]
        assert data.dbEndPosList == [11, 11]
        assert data.qIdx.tolist() == list(range(14))
        assert [rows.tolist() for rows in data.pIdx[[0, 7]]] == [[0], [11]]
        assert data.all_pos_indices[7].tolist() == [0]
        assert data.nonNegIdx[7].tolist() == [11, 12, 13]
        assert data.night.tolist() == [0, 4, 7, 11]
        assert data.sideways.tolist() == [0, 1, 2, 7, 8, 9]
        assert data.qImages[7].endswith("/train_val/london/query/images/londonq0.jpg")
        assert data.weights[3] == 1
        assert data.weights[0] == pytest.approx(1 + 14 / 4 + 14 / 6)
        assert MSLS(root, "trondheim", positive_sampling=False).weights.tolist() == [1] * 7

    def test_cities_by_mode(self, root):
        assert MSLS(root, mode="val", posDistThr=25).cities == ["cph"]
        assert set(MSLS(root).cities) == {"trondheim", "london"}
        assert default_cities["val"] == ["cph", "sf"]

    @pytest.mark.parametrize("chosen", [{"task": "seq2seq"}, {"seq_length": 3}, {"mode": "test"}])
    def test_sequences_are_refused(self, root, chosen):
        [(key, value)] = chosen.items()
        with pytest.raises(ArgumentError, match=f"{key}={value!r}"):
            MSLS(root, **chosen)

    @pytest.mark.parametrize("by_network", [False, True])
    def test_triplets(self, root, network, by_network):
        data = MSLS(root, nNeg=3, transform=TRANSFORM, cached_queries=9, bs=4)
        data.new_epoch()
        assert data.nCacheSubset == 2
        data.update_subcache(network if by_network else None, thin.CLUSTERS * 512)
        assert len(data) == 7
        for (query, positive, *negatives), target in data.triplets:
            assert positive in data.pIdx[query]
            assert set(negatives).isdisjoint(data.nonNegIdx[query])
            assert target == [-1, 1, 0, 0, 0]
        query, positive, negatives, counts, rows = data.collate_fn([data[0], None, data[1]])
        assert query.shape == positive.shape == (2, 3, 96, 128)
        assert negatives.shape == (6, 3, 96, 128)
        assert counts.tolist() == [3, 3]
        assert rows == data.triplets[0][0] + data.triplets[1][0]

    def test_numpys_seed_decides(self, root):
        drawn = []
        for seed in (1, 1, 2):
            np.random.seed(seed)  # noqa: NPY002
            data = MSLS(root)
            data.new_epoch()
            data.update_subcache()
            drawn.append(data.triplets)
        assert drawn[0] == drawn[1] != drawn[2]

    def test_images_from_list(self, root):
        images = ImagesFromList(MSLS(root).dbImages, TRANSFORM)
        image, row = images[3]
        assert len(images) == 22
        assert (image.shape, row) == ((3, 96, 128), 3)


class Board(list):
    def add_scalar(self, tag, value, step):
        self.append((tag, float(value), step))


class TestFunctions:
    def test_train_epoch(self, root, network, sections):
        data, board = MSLS(root, nNeg=2, transform=TRANSFORM), Board()
        trained = nn.Module()
        trained.add_module("encoder", thin.build_encoder())
        trained.add_module("pool", NetVLAD(thin.CLUSTERS, 512))
        trained.load_state_dict(network.state_dict())
        criterion = nn.TripletMarginLoss(margin=0.1**0.5, p=2, reduction="sum")
        optimiser = torch.optim.SGD(trained.parameters(), lr=0.1)
        opt = SimpleNamespace(threads=0)
        for epoch in range(2):
            train_epoch(data, trained, optimiser, criterion, 512, CPU, epoch, opt, sections, board)
        losses = [(value, step) for tag, value, step in board if tag == "Train/Loss"]
        assert [step for _, step in losses] == list(range(1, 11))  # 14 queries, 3 a step
        means = [value for tag, value, _ in board if tag == "Train/AvgLoss"]
        np.testing.assert_allclose(means[0], np.mean([value for value, _ in losses[:5]]))
        assert not torch.equal(trained.pool.centroids, network.pool.centroids)

    def test_val(self, root, network, sections):
        data, board = MSLS(root, mode="val", posDistThr=25), Board()
        opt = SimpleNamespace(threads=1)
        recalls = val(data, network, 512, CPU, opt, sections, board, 3, write_tboard=True)
        assert list(recalls) == [1, 5, 10, 20, 50, 100]
        assert recalls[100] == 1
        assert ("Val/Recall_5", recalls[5], 3) in board

    def test_get_clusters(self, root, network, sections, tmp_path):
        pytest.importorskip("h5py")
        opt = SimpleNamespace(threads=1, cache_path=str(tmp_path))
        get_clusters(MSLS(root), network, 512, CPU, opt, sections)
        found = Clusters.load(tmp_path / "centroids" / "vgg16_mapillary_4_desc_cen.hdf5")
        assert found.centroids.shape == (4, 512)
        assert found.descriptors.shape == (22 * 100, 512)

    @pytest.mark.parametrize(
        ("every", "best", "names"),
        [
            (False, False, {"checkpoint.pth.tar"}),
            (False, True, {"checkpoint.pth.tar", "model_best.pth.tar"}),
            (True, True, {"checkpoint_epoch3.pth.tar", "model_best.pth.tar"}),
        ],
    )
    def test_save_checkpoint(self, tmp_path, every, best, names):
        opt = SimpleNamespace(save_file_path=str(tmp_path), save_every_epoch=every)
        save_checkpoint({"epoch": 3, "x": torch.ones(1)}, opt, best)
        assert {file.name for file in tmp_path.iterdir()} == names
        for name in names:
            assert torch.load(tmp_path / name, weights_only=True)["epoch"] == 3

    def test_humanbytes(self):
        sizes = [0, 1, 1023, 1024, 1500, 10**6, 2**20, 5 * 2**30, 3 * 2**40]
        assert [humanbytes(size) for size in sizes] == [
            "0.0 Byte", "1.0 Byte", "1023.0 Byte", "1.00 KB", "1.46 KB", "976.56 KB", "1.00 MB",
            "5.00 GB", "3.00 TB",
        ]  # fmt: skip

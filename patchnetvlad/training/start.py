# SPDX-License-Identifier: MIT
"""Training, from the initial weights to the last checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from patchnetvlad.base.files import make_folder
from patchnetvlad.config import Config
from patchnetvlad.config_train import TrainConfig
from patchnetvlad.errors import CheckpointError
from patchnetvlad.models.checkpoint import model_from_state, read_contents
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.training.card import images_digest, write_card
from patchnetvlad.training.clusters import Clusters, check_h5py, cluster, sample_cells
from patchnetvlad.training.files import Progress, load_training, load_weights, save_model
from patchnetvlad.training.fit import (
    WHITENING_IMAGES,
    add_whitening,
    check_components,
    choose_rows,
)
from patchnetvlad.training.history import History
from patchnetvlad.training.loop import Training, freeze, train
from patchnetvlad.training.losses import check_metric_learning
from patchnetvlad.training.maps import Inputs, Pixels, cache_maps, open_maps, split_encoder
from patchnetvlad.training.places import PlaceSet
from patchnetvlad.training.ranks import Ranks, joined
from patchnetvlad.training.recipes import PlaceRecipe, Recipe, TripletRecipe
from patchnetvlad.training.schedule import make_optimiser
from patchnetvlad.training.tuples import Area, TupleSet

logger = logging.getLogger(__name__)

BEST = "model_best.pth.tar"


@dataclass(frozen=True)
class Trained:
    """Files written by :func:`train_network`.

    Attributes
    ----------
    folder : Path
        With TensorBoard's file; ``checkpoints`` is in it.
    checkpoint : Path
        The best one, or the latest where nothing was validated; with a trained whitening layer, a
        copy of that without what only training needs, named ``*_WPCA{P}.pth.tar``.
    progress : Progress
        Where training ended.
    """

    folder: Path
    checkpoint: Path
    progress: Progress


def train_network(
    config: TrainConfig,
    training_areas: Sequence[Area],
    validation_areas: Sequence[Area],
    save_path: str | Path,
    cache_path: str | Path,
    *,
    data_name: str = "mapillary",
    weights: str | Path | None = None,
    clusters: str | Path | None = None,
    resume: str | Path | None = None,
    identifier: str = "",
    epochs: int = 30,
    start_epoch: int = 0,
    keep: bool = False,
    threads: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Trained:
    """Train NetVLAD, with triplets as in the research code, or by the loss of the configuration.

    Parameters
    ----------
    config : TrainConfig
    training_areas, validation_areas : sequence of Area
        Without the latter nothing is validated, and the latest checkpoint is the result.
    save_path : str or Path
        Gets a folder of this run.
    cache_path : str or Path
        Gets ``centroids/vgg16_{data_name}_{K}_desc_cen.hdf5``, and the maps of frozen layers.
    data_name : str, default "mapillary"
    weights : str or Path, optional
        Encoder to start from; see :func:`~patchnetvlad.training.files.load_weights`.
    clusters : str or Path, optional
        File of a vocabulary, in place of one from the index images.
    resume : str or Path, optional
        Checkpoint that training goes on from.
    identifier : str, default ""
        Ends the name of the run's folder.
    epochs : int, default 30
        In all.
    start_epoch : int, default 0
        Number of the first; that of ``resume``, if there is one.
    keep : bool, default False
        Keep a checkpoint of each epoch.
    threads : int, default 0
        That decode images; 0 chooses their number.
    device : str, default "auto"
    progress : bool, default True
        Show progress bars.

    Returns
    -------
    Trained

    Raises
    ------
    GroundTruthError
        No query has a positive or a negative, or there is no place of two images.
    ConfigError
        No layer is frozen whose output can be kept.
    CheckpointError, AssetError
        A checkpoint or the clusters cannot be read, or do not fit.
    ArgumentError
        h5py or pytorch-metric-learning is missing, or there are too few images for so many
        clusters or components.
    OutputError, FeatureError
        A file cannot be written.
    """
    if config.loss == "multisimilarity":
        check_metric_learning()
    data = _data(config, training_areas)
    images = config.for_images(threads)
    if config.train_pca:
        check_components(config.num_pcs, len(_recipe(data, config).index))
    torch.manual_seed(config.seed)
    done = Progress(epoch=start_epoch)
    optimiser_state: dict[str, Any] | None = None
    if resume:
        state, optimiser_state, done = load_training(resume)
        network = model_from_state(images, state, str(resume))
    else:
        network = _bare(weights, images)
    cache = Path(cache_path)
    with joined(device) as (ranks, where):
        bars = progress and ranks.first
        network.to(where).requires_grad_(True)
        freeze(network.get_submodule("encoder"))
        trained, inputs, data = _inputs(
            network, data, validation_areas, config, images, cache, bars, ranks
        )
        recipe = _recipe(data, config, ranks.size)
        if not resume:
            pool = ranks.spread(
                lambda: _pool(
                    trained, recipe, inputs, config, images, clusters, cache, data_name, bars
                )
            )
            network.pool = trained.pool = pool.to(where)
            if config.train_pca:
                layer = ranks.spread(
                    lambda: _whitening(trained, recipe, inputs, config, images, cache, bars)
                )
                network.WPCA = trained.WPCA = layer.to(where)
        network.eval()
        optimiser = make_optimiser(network, config)
        if optimiser_state is not None:
            _restore(optimiser, optimiser_state, str(resume))
        folder = ranks.spread(lambda: _new_folder(Path(save_path), identifier))
        training = Training(
            network, trained, optimiser, config, recipe, inputs, validation_areas, epochs, threads,
            _board(folder) if ranks.first else None, bars, ranks, _scaler(config, where, done),
        )  # fmt: skip
        return _run(training, folder, done, resume, keep)


def _run(
    training: Training, folder: Path, done: Progress, resume: str | Path | None, keep: bool
) -> Trained:
    """Train into a new folder, which gets what there is of the run that is resumed."""
    history, checkpoints = None, folder / "checkpoints"
    if training.ranks.first:
        make_folder(checkpoints)
        earlier = Path(resume).with_name(BEST) if resume else None
        if earlier is not None and earlier.is_file():
            shutil.copyfile(earlier, checkpoints / BEST)
        before = Path(resume).absolute().parent.parent if resume else None
        history = History(folder, before, done.epoch)
    epochs = training.epochs
    ended = train(training, checkpoints, epochs, done, keep=keep, history=history)
    best = checkpoints / BEST
    found = best if best.is_file() else checkpoints / "checkpoint.pth.tar"
    if training.config.train_pca:
        found = training.ranks.spread(lambda: _without_training(found, training))
    return Trained(folder, found, ended)


def _without_training(checkpoint: Path, training: Training) -> Path:
    """Copy the weights of a checkpoint with whitening, named as configurations expect it."""
    config, images = training.config, training.recipe.index
    name = checkpoint.name.removesuffix(".pth.tar")
    target = checkpoint.with_name(f"{name}_WPCA{config.num_pcs}.pth.tar")
    content = read_contents(checkpoint)
    save_model(content["state_dict"], target, num_pcs=config.num_pcs)
    facts = {
        "weights": f"{checkpoint.name}, of epoch {content['epoch']}",
        "images": len(images),
        "sha256 of their names": images_digest(images),
        "components": f"{config.num_pcs}, trained",
        "image size": f"{config.image_size[1]} x {config.image_size[0]} px",
        "loss": config.loss,
        "seed": config.seed,
    }
    write_card(target, "Trained with its whitening layer.", facts, content["recalls"] or None)
    return target


def _scaler(config: TrainConfig, device: torch.device, done: Progress) -> GradScaler:
    """Return the scale of gradients, which is enabled for mixed precision on CUDA."""
    enabled = config.mixed_precision and device.type == "cuda"
    if config.mixed_precision and not enabled:
        logger.info("amp = True has no effect on %s: it takes a CUDA GPU", device)
    scaler = GradScaler("cuda", enabled=enabled)
    if enabled and done.scaler:
        scaler.load_state_dict(done.scaler)
    return scaler


def _data(config: TrainConfig, areas: Sequence[Area]) -> TupleSet | PlaceSet:
    """Find what can be learnt from."""
    if config.loss == "multisimilarity":
        return PlaceSet.of_areas(
            areas,
            config.cell_size or config.positive_distance,
            config.cell_heading,
            config.negative_distance,
        )
    data = TupleSet.of_areas(areas, config.positive_distance, config.negative_distance)
    logger.info(
        "training on %d queries and %d index images; %d queries have no positive and are left out",
        len(data.queries),
        len(data.index),
        data.left_out,
    )
    return data


def _recipe(
    data: TupleSet | PlaceSet, config: TrainConfig, processes: int = 1
) -> TripletRecipe | PlaceRecipe:
    """Return the recipe, whose batches have a share for each process."""
    if isinstance(data, PlaceSet):
        return PlaceRecipe(data, replace(config, places=processes * config.places))
    return TripletRecipe(data, replace(config, batch_size=processes * config.batch_size))


def _inputs(
    network: nn.Module,
    data: TupleSet | PlaceSet,
    areas: Sequence[Area],
    config: TrainConfig,
    images: Config,
    cache: Path,
    progress: bool,
    ranks: Ranks,
) -> tuple[nn.Module, Inputs, TupleSet | PlaceSet]:
    """Return what is trained, what that takes, and the data that can be read."""
    if not config.cache_maps:
        return network, Pixels(images, config.augment), data
    frozen, rest = split_encoder(network.get_submodule("encoder"))
    trained = nn.Module()
    trained.add_module("encoder", rest)
    for name in ("pool", "WPCA"):
        if hasattr(network, name):
            trained.add_module(name, network.get_submodule(name))
    paths = [*_recipe(data, config).images]
    paths += [path for area in areas for path in (*area.index, *area.queries)]
    views = config.cached_views
    frozen.eval()

    def compute() -> None:
        cache_maps(frozen, paths, images, cache, views=views, progress=progress)

    ranks.spread(compute)
    maps = open_maps(frozen, images, cache, views)
    if isinstance(data, PlaceSet):
        data = data.without([path for path in data.images if maps.has_failed(path)])
    return trained, maps, data


def _new_folder(parent: Path, identifier: str) -> Path:
    """Make the folder of a run, named by the time."""
    name = datetime.now().strftime("%b%d_%H-%M-%S") + (f"_{identifier}" if identifier else "")
    make_folder(parent)
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return make_folder(folder)


def _bare(weights: str | Path | None, images: Config) -> nn.Module:
    """Load an encoder."""
    state, path = load_weights(weights or images.encoder)
    bare = replace(images, pooling="avg", vladv2=False, num_pcs=0)
    return model_from_state(bare, state, str(path))


def _pool(
    trained: nn.Module,
    recipe: Recipe,
    inputs: Inputs,
    config: TrainConfig,
    images: Config,
    file: str | Path | None,
    cache: Path,
    data_name: str,
    progress: bool,
) -> NetVLAD:
    """Return the pooling layer of the vocabulary in a file, or of one that is made and written."""
    if file:
        found = Clusters.load(Path(file))
        if len(found.centroids) != config.num_clusters:
            raise CheckpointError(
                f"{file} has {len(found.centroids)} clusters, but {config.source} asks for "
                f"num_clusters = {config.num_clusters}"
            )
    else:
        check_h5py()
        folder = make_folder(cache / "centroids")
        encoder = trained.get_submodule("encoder").eval()
        cells = sample_cells(
            encoder, recipe.index, images, inputs=inputs, seed=config.seed, progress=progress
        )
        found = cluster(cells, config.num_clusters, config.seed)
        path = found.save(
            folder / f"{images.encoder}_{data_name}_{config.num_clusters}_desc_cen.hdf5"
        )
        logger.info("the vocabulary is %s", path)
    pool = NetVLAD(len(found.centroids), found.centroids.shape[1], vladv2=config.vladv2)
    pool.init_params(found.centroids, found.descriptors)
    return pool


def _whitening(
    trained: nn.Module,
    recipe: Recipe,
    inputs: Inputs,
    config: TrainConfig,
    images: Config,
    cache: Path,
    progress: bool,
) -> nn.Module:
    """Return a whitening layer fitted to the images that are trained on."""
    rows = choose_rows(len(recipe.index), WHITENING_IMAGES, config.seed)
    chosen = [recipe.index[row] for row in rows]
    folder = make_folder(cache)
    add_whitening(
        trained, chosen, images, config.num_pcs, folder=folder, inputs=inputs, progress=progress
    )
    return trained.get_submodule("WPCA")


def _restore(optimiser: torch.optim.Optimizer, state: dict[str, Any], source: str) -> None:
    try:
        optimiser.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the optimiser of {source} does not fit (is optim the same?): {error}"
        ) from None


def _board(folder: Path) -> Any:
    """Open TensorBoard's file; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("nothing is written for TensorBoard: pip install 'patchnetvlad[train]'")
        return None
    return SummaryWriter(log_dir=str(folder))

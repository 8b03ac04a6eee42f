# SPDX-License-Identifier: MIT
"""The network: VGG16 encoder, NetVLAD and patch-level pooling, whitening, checkpoints."""

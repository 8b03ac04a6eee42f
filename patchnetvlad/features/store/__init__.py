# SPDX-License-Identifier: MIT
"""The feature store: raw shards, and an SQLite index of the records in them.

A record holds everything of one image: its global descriptor (float32) and its patch descriptors
in the type of the store, or its feature map. Records are appended to ``features-00000.bin`` and
so on; ``features.sqlite`` says where each is and what its checksum is. A record is entered in the
index only after its shard is on the disk, so whatever happens in between, every record of the
index can be read.
"""

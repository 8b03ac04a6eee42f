# SPDX-License-Identifier: MIT
"""Live recognition: places in the frames of a camera, a video or a folder."""

from patchnetvlad.live.loop import KeptFrame as KeptFrame
from patchnetvlad.live.loop import Rate as Rate
from patchnetvlad.live.loop import Recognition as Recognition
from patchnetvlad.live.loop import recognise as recognise
from patchnetvlad.live.overlay import draw_overlay as draw_overlay
from patchnetvlad.live.sources import Frame as Frame
from patchnetvlad.live.sources import Source as Source
from patchnetvlad.live.sources import open_source as open_source

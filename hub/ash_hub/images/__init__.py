"""OCI images on this machine: read from archives, unpacked once, kept as directories that sandboxes begin as.

names.py      how an image is named
manifests.py  what an image says of itself: platform, layers, configuration. Pure
archives.py   where the parts of an image are read from: an OCI layout, an archive of one, an archive of docker's
layers.py     a layer's archive, unpacked so that nothing of it reaches beyond its directory
store.py      the images and layers that are kept
pull.py       images of registries, by skopeo
"""

from ash_hub.images.manifests import ImageConfig
from ash_hub.images.store import Image, ImageStore

__all__ = ["Image", "ImageConfig", "ImageStore"]

"""Fetches the packages that training learns from: by name and version from npm, checked by SHA-256."""

import hashlib
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One npm package of art or names, pinned by the checksum of its tarball.

    Attributes:
        name, version: as on the npm registry.
        sha256: hexadecimal digest of the file that `npm pack` writes.
        licence: of the art, which may differ from the package's own.
    """

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def tarball(self) -> str:
        """File name that `npm pack` gives it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES: dict[str, Package] = {
    "3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT (Microsoft Fluent Emoji)",
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT (Microsoft Fluent Emoji)",
    ),
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0 (Google Noto Emoji)",
    ),
    "twemoji": Package(
        "@twemoji/svg",
        "15.0.0",
        "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3",
        "CC-BY-4.0 (Twemoji graphics), held out: for measuring only",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0 (Google Noto Emoji of 2017), for recognising, and for measuring the VAE",
    ),
    "high-contrast": Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "MIT (Microsoft Fluent Emoji), for recognising only",
    ),
    "color": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT (Microsoft Fluent Emoji), for describing only",
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0 (Mozilla FxEmojis), for describing only",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0 (EmojiTwo), for describing only",
    ),
    "monochrome": Package(
        "@fontsource/noto-emoji",
        "5.3.2",
        "1fe49bb2cf7c2d78f93c0a69b6a431dcfd0d585b7831eba87fae6888ccf8d373",
        "OFL-1.1 (Noto Emoji font), for describing only",
    ),
    "names": Package(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "MIT (labels and tags from Unicode CLDR)",
    ),
}


class ArtChecksumMismatch(Exception):
    """A fetched package is not the file the data set was made from."""


def fetch(package: Package, folder: Path) -> Path:
    """Folder with the unpacked package, fetched by `npm pack` unless already there.

    Raises:
        ArtChecksumMismatch: the tarball differs from the pinned one.
        subprocess.CalledProcessError: npm failed, for example without network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tarball = folder / package.tarball
    if not tarball.exists():
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ArtChecksumMismatch(f"{tarball} has SHA-256 {digest}, not {package.sha256}; delete it and try again")
    unpacked = folder / package.tarball.removesuffix(".tgz")
    if not unpacked.exists():
        with tarfile.open(tarball) as archive:
            archive.extractall(unpacked, filter="data")
    return unpacked / "package"

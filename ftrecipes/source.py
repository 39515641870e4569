"""How Hydra sees the catalogue: a config source `ftr://` that hands out the values of the entries and nothing else.

The reserved blocks of an entry (about, schema, paper and tiny settings) never reach a composed config, so they cannot
leak into `--cfg job`, a record or a hash. Importing this module registers the source with Hydra.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from ftrecipes import catalogue


def primary() -> dict[str, Any]:
    """The primary config: its defaults list, Hydra's own settings, and the plain sections."""
    raw = dict(catalogue.read_yaml(catalogue.CONF / "train.yaml"))
    return {"defaults": raw["defaults"], "hydra": raw["hydra"], **root().values_without_name()}


class _Root(catalogue.Entry):
    """The plain sections (seed, trainer.…) as an entry, so that they share the schema of the groups."""

    def values_without_name(self) -> dict[str, Any]:
        values = self.values()
        values.pop("name")
        return values

    def at(self, knob: str) -> str:
        return knob


def root() -> _Root:
    """The declared knobs of `conf/train.yaml`."""
    path = catalogue.CONF / "train.yaml"
    return _Root(group="", name="train", path=str(path), knobs=catalogue.read_yaml(path)["knobs"])


class CatalogueSource(ConfigSource):
    """Config source over the catalogue and the recipes."""

    @staticmethod
    def scheme() -> str:
        return "ftr"

    def available(self) -> bool:
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        header: dict[str, str | None] = {"package": None}
        if not name and group == "train":
            content = primary()
        elif group == "recipe" and name in catalogue.recipes():
            content, header = catalogue.read_yaml(catalogue.recipes()[name]) or {}, {"package": "_global_"}
        elif group in catalogue.GROUPS and name in catalogue.entries(group):
            entry = catalogue.get(group, name)
            content = entry.values()
            if group == "method":
                header = {"package": f"method.{name}"}
            if entry.brings:
                content = {"defaults": [*map(_pull, *zip(*entry.brings.items(), strict=True)), "_self_"], **content}
        else:
            raise ConfigLoadError(f"no {config_path} in the catalogue")
        config = OmegaConf.create(content)
        if group in catalogue.GROUPS:
            for knob, declared in catalogue.get(group, name).knobs.items():
                if declared["default"] == {}:  # a knob that holds a mapping takes any key
                    OmegaConf.set_struct(OmegaConf.select(config, knob), False)
        return ConfigResult(provider=self.provider, path="ftr://", config=config, header=header)

    def is_group(self, config_path: str) -> bool:
        return bool(self.list(config_path, None))

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        if not name:
            return group == "train"
        return name in catalogue.recipes() if group == "recipe" else name in self._names(group)

    @staticmethod
    def _names(group: str) -> set[str]:
        return set(catalogue.entries(group)) if group in catalogue.GROUPS else set()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        folder = config_path.strip("/")
        if not folder:
            groups, configs = {*catalogue.GROUPS, "recipe"}, {"train"}
        elif folder.split("/")[0] == "recipe":
            prefix = "".join(f"{part}/" for part in folder.split("/")[1:])
            rest = [name[len(prefix) :] for name in catalogue.recipes() if name.startswith(prefix)]
            groups, configs = {r.split("/")[0] for r in rest if "/" in r}, {r for r in rest if "/" not in r}
        else:
            groups, configs = set(), self._names(folder)
        wanted = {ObjectType.GROUP: groups, ObjectType.CONFIG: configs}
        return sorted(groups | configs if results_filter is None else wanted[results_filter])


def _pull(group: str, choice: Any) -> dict[str, Any]:
    return {f"override /{group}@_global_.{group.replace('/', '.')}": choice}


class CatalogueSearchPath(SearchPathPlugin):
    """Puts the catalogue on Hydra's search path."""

    def manipulate_search_path(self, search_path: Any) -> None:
        search_path.append("ftrecipes", "ftr://")


Plugins.instance().register(CatalogueSource)
Plugins.instance().register(CatalogueSearchPath)
SourcesRegistry.instance().register(CatalogueSource)

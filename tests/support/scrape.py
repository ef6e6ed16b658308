"""What a Prometheus endpoint says at one moment."""

from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Scrape:
    samples: tuple[tuple[str, dict[str, str], float], ...]

    @classmethod
    def parse(cls, text: str) -> "Scrape":
        families = text_string_to_metric_families(text)
        return cls(tuple((s.name, s.labels, s.value) for family in families for s in family.samples))

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of `name` that have `labels`; 0 for a series that does not exist yet."""
        return sum(v for n, has, v in self.samples if n == name and labels.items() <= has.items())

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The samples of `name`, summed for each value of `label`."""
        values = {labels[label] for n, labels, _ in self.samples if n == name and label in labels}
        return {value: self.value(name, **{label: value}) for value in sorted(values)}

    def has(self, name: str) -> bool:
        return any(sample[0] == name for sample in self.samples)


async def scrape(http: httpx.AsyncClient, url: str) -> Scrape:
    """Raises httpx.HTTPError when nobody answers."""
    return Scrape.parse((await http.get(url)).raise_for_status().text)

"""`submit --estimate`: prepare a few images as a worker does. Import it late; it loads the SDK."""

import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

from worker.app.assembly import image_loader, open_s3
from worker.cli.sent_images import Sent, prepare
from worker.cli.shell import Screen
from worker.cli.submit.plan import Planner
from worker.errors import DependencyDownError, JobError, TransientError
from worker.observability.redaction import display_url
from worker.settings import load_settings


async def prepare_samples(planner: Planner, screen: Screen) -> AsyncIterator[tuple[str, Sent]]:
    """Yield the name of each sample, and what a worker would send; set the planner's tokens per image.

    Raises:
        SettingsError: the settings are not sufficient for a worker.
        S3ConfigurationError: the AWS configuration is invalid.
    """
    settings, counts = screen.load(load_settings, is_quiet=True), list[int | None]()
    async with AsyncExitStack() as stack:
        loader = image_loader(settings, await open_s3(settings, stack), stack)
        for model, ref in planner.samples:
            path = planner.uploads.get(ref.url)
            url = ref.url if path is None else _data_url(path)
            try:
                sent = await prepare(loader, model, ref, url)
            except (JobError, TransientError, DependencyDownError) as error:
                sent = Sent(f"cannot be sent: {error.message}")
            counts.append(sent.tokens)
            yield str(path) if path else display_url(ref.url), sent
    known = [count for count in counts if count is not None]
    if known and len(known) == len(counts):
        planner.tokens_per_image = -(-sum(known) // len(known))


def _data_url(path: Path) -> str:
    return f"data:image/any;base64,{base64.b64encode(path.read_bytes()).decode()}"

"""pytorch-forecasting: forget four of forty time series.

    pip install hamu_lightning pytorch-forecasting
    python forget_series.py

`from_dataset` gives the series to forget a dataset of their own, with the encoders of all; its loader goes to the
callback. `exact=True`: the project's Adam would otherwise rescale the rule's step.
"""

from lightning.pytorch import Trainer, seed_everything
from pytorch_forecasting import NBeats, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import StepOptions
from hamu_lightning.rules import RelativeRadius


def show(when: str) -> None:
    """Print the validation loss on both parts."""
    loaders = [part.to_dataloader(train=False, batch_size=256) for part in (forget, retain)]
    losses = [trainer.validate(model, loader, verbose=False)[0]["val_loss"] for loader in loaders]
    print(f"\n{when}: loss on the series to forget {losses[0]:.3f}, on the others {losses[1]:.3f}")


seed_everything(0)
data = generate_ar_data(n_series=40, timesteps=60, seed=0)
columns = {"time_idx": "time_idx", "target": "value", "group_ids": ["series"], "time_varying_unknown_reals": ["value"]}
everything = TimeSeriesDataSet(data, **columns, max_encoder_length=24, max_prediction_length=6)
forget, retain = (TimeSeriesDataSet.from_dataset(everything, data[(data.series < 4) == gone]) for gone in (True, False))

model = NBeats.from_dataset(everything, learning_rate=1e-3, optimizer="adam", log_interval=-1)
trainer = Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, everything.to_dataloader(batch_size=64))
show("before")

callback = HAMUCallback(
    forget.to_dataloader(batch_size=32), HAMUQ(0.05, radius=RelativeRadius(2e-3)), steps=StepOptions(exact=True)
)
trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
trainer.fit(model, retain.to_dataloader(batch_size=64))
show("after")

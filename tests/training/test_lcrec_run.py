import tiny_run

from simgr_jax.evaluation.metrics import summarize
from simgr_jax.models import popularity


def test_the_autoregressive_model_learns_more_than_popularity(tmp_path):
    """Two codes an item: a row holds twelve items, as those of the other models."""
    config = tiny_run.config(row_length=24)
    config.model.update({"name": "autoregressive", "history": "tokens"})
    config.autoregressive.beam_width = 10
    tiny_run.train(config, tmp_path)
    losses = [line["train/loss"] for line in tiny_run.log(tmp_path) if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    split = tiny_run.split()
    ranking = popularity.rank(split.train, tiny_run.NUM_ITEMS, split.validation.targets, 10)
    popular = summarize(ranking.target_rank, ranking.items, tiny_run.NUM_ITEMS)["NDCG@10"]
    learned = [line["validation/NDCG@10"] for line in tiny_run.log(tmp_path) if "validation/NDCG@10" in line]
    assert learned[-1] > 2 * popular

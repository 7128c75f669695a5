import tiny_run


def test_lcrec_learns_more_than_popularity(tmp_path):
    """Items have two codes, so a row of 24 holds twelve items, as rows of 12 do with other models."""
    config = tiny_run.config("lcrec", row_length=24)
    config.lcrec.beam_width = 10
    tiny_run.train(config, tmp_path)
    losses = [line["train/loss"] for line in tiny_run.log(tmp_path) if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    learned = [line["validation/NDCG@10"] for line in tiny_run.log(tmp_path) if "validation/NDCG@10" in line]
    assert learned[-1] > 2 * tiny_run.popularity_ndcg()

"""The private names of Lightning and torch that ``callbacks/_lightning.py`` touches.

Hold for Lightning 2.6 and torch 2.11 to 2.13. A failure here after an upgrade says which adapter has to be looked at.
"""

from __future__ import annotations

import inspect
import signal
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies.fsdp import _is_sharded_checkpoint
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data import dataloader as torch_dataloader
from torch.utils.data._utils import worker as torch_worker
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from elastic_fit.callbacks import _lightning, _loaders, _sharded
from tests.checkpoint.models import Line, trainer


def test_the_versions_that_this_contract_names() -> None:
    assert pl.__version__.split(".")[:2] == ["2", "6"]
    assert (2, 10) <= tuple(int(part) for part in torch.__version__.split(".")[:2]) <= (2, 13)


def test_the_epoch_loop_says_whether_gradients_are_half_accumulated(tmp_path) -> None:
    training = trainer(tmp_path)
    assert callable(training.fit_loop.epoch_loop._should_accumulate)
    assert training.fit_loop.epoch_loop.batch_progress.is_last_batch is False


def test_the_checkpoint_connector_dumps_and_restores() -> None:
    assert list(inspect.signature(_CheckpointConnector.dump_checkpoint).parameters) == ["self", "weights_only"]
    restore = inspect.signature(_CheckpointConnector._restore_modules_and_callbacks)
    assert list(restore.parameters) == ["self", "checkpoint_path", "weights_only"]
    assert "_restore_modules_and_callbacks" in inspect.getsource(pl.Trainer._run)


def test_a_captured_state_names_the_progress_that_a_rescue_puts_back(tmp_path) -> None:
    training = trainer(tmp_path, max_epochs=1)
    training.fit(Line())
    state = training._checkpoint_connector.dump_checkpoint(False)["loops"]["fit_loop"]
    counts = {"ready", "started", "processed", "completed"}
    assert set(state["epoch_loop.batch_progress"]["current"]) == counts
    assert set(state["epoch_loop.batch_progress"]["total"]) == counts
    assert "is_last_batch" in state["epoch_loop.batch_progress"]
    assert "_batches_that_stepped" in state["epoch_loop.state_dict"]


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_a_tuning_run_can_be_told_from_a_training(finder: type) -> None:
    assert finder()._early_exit is False


def test_who_writes_a_checkpoint() -> None:
    assert "save_checkpoint" not in vars(DDPStrategy)
    assert "save_checkpoint" in vars(ModelParallelStrategy)
    assert list(inspect.signature(Strategy.save_checkpoint).parameters) == [
        "self",
        "checkpoint",
        "filepath",
        "storage_options",
    ]


def test_the_world_is_checked_in_one_place() -> None:
    parameters = inspect.signature(TorchElasticEnvironment.validate_settings).parameters
    assert list(parameters) == ["self", "num_devices", "num_nodes"]


def test_torch_writes_shards_through_streams_and_keeps_a_default_store() -> None:
    assert list(inspect.signature(FileSystem.create_stream).parameters) == ["self", "path", "mode"]
    assert callable(distributed_c10d._get_default_store)


def test_model_checkpoint_has_the_hooks_that_ours_overrides() -> None:
    names = {
        "_save_topk_checkpoint": ["self", "trainer", "monitor_candidates"],
        "_save_last_checkpoint": ["self", "trainer", "monitor_candidates"],
        "_save_checkpoint": ["self", "trainer", "filepath"],
        "_link_checkpoint": ["trainer", "filepath", "linkpath"],
        "_should_skip_saving_checkpoint": ["self", "trainer"],
        "_monitor_candidates": ["self", "trainer"],
    }
    for name, parameters in names.items():
        assert list(inspect.signature(getattr(ModelCheckpoint, name)).parameters) == parameters
    state = vars(ModelCheckpoint())
    assert {"_last_global_step_saved", "_defer_save_until_validation", "_every_n_epochs"} <= set(state)


def test_fit_takes_the_arguments_that_the_launcher_passes_on() -> None:
    assert list(inspect.signature(pl.Trainer.fit).parameters) == [
        "self",
        "model",
        "train_dataloaders",
        "val_dataloaders",
        "datamodule",
        "ckpt_path",
        "weights_only",
    ]


def test_lightnings_own_requeue_is_off_under_a_launcher_that_says_so(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    launcher = {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**job, "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    assert isinstance(trainer(tmp_path)._accelerator_connector.cluster_environment, SLURMEnvironment)
    for name, value in {**ranks, **launcher}.items():
        monkeypatch.setenv(name, value)
    assert isinstance(trainer(tmp_path)._accelerator_connector.cluster_environment, TorchElasticEnvironment)
    source = inspect.getsource(_SignalConnector.register_signal_handlers)
    assert "isinstance(environment, SLURMEnvironment) and environment.auto_requeue" in source


def test_lightnings_signal_handling_can_be_taken_and_given_back(tmp_path) -> None:
    training = trainer(tmp_path)
    assert "self._signal_connector.register_signal_handlers()" in inspect.getsource(pl.Trainer._run)
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(type(training.fit_loop.epoch_loop).advance)
    _lightning.take_signals(training)
    training._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    _lightning.give_signals_back(training)
    for owner, name in (
        (training._signal_connector, "register_signal_handlers"),
        (training.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    ):
        assert getattr(owner, name).__func__ is getattr(type(owner), name)


def test_a_validation_that_is_under_way_is_known_by_its_progress(tmp_path) -> None:
    training = trainer(tmp_path, max_epochs=1)
    training.fit(Line())
    progress = training.fit_loop.epoch_loop.val_loop.batch_progress
    assert {"total", "current", "is_last_batch"} == set(vars(progress))
    assert training.lightning_module._current_fx_name is None
    assert set(training._logger_connector._callback_metrics) == set(training.callback_metrics)


def test_what_follows_a_batch_is_one_method_of_the_loop_and_a_batch_another(tmp_path) -> None:
    loop = trainer(tmp_path).fit_loop.epoch_loop
    run = inspect.getsource(type(loop).run)
    assert run.index("while not self.done:") < run.index("self.advance(data_fetcher)")
    assert run.index("self.advance(data_fetcher)") < run.index("self.on_advance_end(data_fetcher)")
    assert inspect.getsource(type(loop).on_advance_end).count("self._should_check_val_fx(data_fetcher)") == 1
    assert "self.trainer.enable_validation and" in inspect.getsource(type(loop)._should_check_val_epoch)
    assert "return not self.restarting or self.val_loop._has_run" in inspect.getsource(
        type(loop)._is_validation_done.fget
    )
    batch = inspect.getsource(type(loop).advance)
    assert batch.index("self.batch_progress.increment_processed()") < batch.index("self.update_lr_schedulers(")
    assert (loop._is_training_done, loop.val_loop._has_run) == (False, False)
    assert (loop.scheduler_progress.current.ready, loop.scheduler_progress.current.completed) == (0, 0)


def test_a_training_that_is_done_is_left_before_its_first_hook(tmp_path) -> None:
    loop = trainer(tmp_path).fit_loop
    run = inspect.getsource(type(loop).run)
    order = ["self.setup_data()", "if self.skip:", "self.reset()", "self.on_run_start()", "while not self.done:"]
    assert [run.index(one) for one in order] == sorted(run.index(one) for one in order)
    assert {"max_epochs", "_restarting", "_restart_stage"} <= set(vars(loop))
    assert "max_steps" in vars(loop.epoch_loop)
    assert "self.fit_loop.run()" in inspect.getsource(pl.Trainer._run_stage)
    assert loop._can_stop_early is True


def test_a_captured_state_has_the_small_parts_under_these_names() -> None:
    dump = inspect.getsource(_CheckpointConnector.dump_checkpoint)
    for name in ('"epoch"', '"loops"', '"callbacks"', '"lr_schedulers"', '"optimizer_states"', '"state_dict"'):
        assert name in dump
    assert "self._get_loops_state_dict()" in dump
    assert "call._call_callbacks_state_dict(trainer)" in dump
    assert "current_model_state" in inspect.getsource(WeightAveraging.on_save_checkpoint)


def test_averaged_weights_come_and_go_by_one_method() -> None:
    assert list(inspect.signature(WeightAveraging._swap_models).parameters) == ["self", "pl_module"]
    for hook in (WeightAveraging.on_validation_epoch_start, WeightAveraging.on_validation_epoch_end):
        assert "self._swap_models(pl_module)" in inspect.getsource(hook)


def test_a_thread_can_have_a_connection_to_the_store_of_its_own() -> None:
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = distributed_c10d.PrefixStore("job", served)
    store.clone().set("key", "value")
    assert store.get("key") == b"value"


def test_process_groups_can_be_aborted() -> None:
    assert callable(distributed_c10d.ProcessGroup.abort)


def test_loggers_keep_their_version_and_their_writer_where_ours_are_put(tmp_path) -> None:
    logger = CSVLogger(tmp_path)
    assert logger._version is None
    assert logger._experiment is None
    assert {"metrics", "metrics_keys", "metrics_file_path"} <= set(vars(logger.experiment))
    assert list(inspect.signature(ExperimentWriter._check_log_dir_exists).parameters) == ["self"]
    board = TensorBoardLogger(tmp_path, version=3)
    assert (board._version, board._experiment, board._kwargs) == (3, None, {})


def test_the_logger_connector_says_what_it_is_about_to_log(tmp_path) -> None:
    training = trainer(tmp_path)
    connector = training._logger_connector
    assert connector._first_loop_iter is None
    assert isinstance(type(connector).should_update_logs, property)
    assert isinstance(type(connector).metrics, property)
    assert training.fit_loop.epoch_loop._batches_that_stepped == 0


def test_a_dataloader_reads_its_batches_from_where_ours_are_put() -> None:
    loader = DataLoader(range(4), batch_size=2)
    vars(loader)["batch_sampler"] = [[3, 2], [1, 0]]
    assert [batch.tolist() for batch in loader] == [[3, 2], [1, 0]]
    assert list(inspect.signature(_MapDatasetFetcher.fetch).parameters) == ["self", "possibly_batched_index"]


def test_the_fit_loop_knows_for_which_epoch_its_loaders_were_made(tmp_path) -> None:
    training = trainer(tmp_path, max_epochs=2)
    assert training.fit_loop._last_train_dl_reload_epoch == float("-inf")
    training.fit(Line())
    assert training.fit_loop._last_train_dl_reload_epoch == 0


def test_the_connector_looks_for_what_lightnings_own_requeue_has_saved(tmp_path) -> None:
    assert trainer(tmp_path)._checkpoint_connector._hpc_resume_path is None
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    assert trainer(tmp_path)._checkpoint_connector._hpc_resume_path == str(tmp_path / "hpc_ckpt_1.ckpt")


def test_a_captured_state_holds_the_loaders_states_where_they_can_be_dropped(tmp_path) -> None:
    class Own:
        def __iter__(self):
            return iter([[torch.ones(2, 4)]])

        def state_dict(self):
            return {"place": 1}

        def load_state_dict(self, state):
            raise AssertionError

    training = trainer(tmp_path, max_epochs=1)
    training.fit(Line(), Own())
    state = training._checkpoint_connector.dump_checkpoint(False)
    assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"place": 1}]
    _loaders.drop_loader_states(state)
    assert "combined_loader" not in state["loops"]["fit_loop"]["state_dict"]


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
def test_combined_loaders_say_whether_the_shorter_ones_are_gone_through_again(tmp_path, mode: Any) -> None:
    training = trainer(tmp_path, max_epochs=1)
    training.fit(Line(), CombinedLoader([DataLoader(torch.ones(4, 4))], mode))
    assert _loaders.is_cycled(training) == (mode == "max_size_cycle")


def test_a_dataloader_looks_its_workers_loop_up_and_says_there_when_they_are_to_end() -> None:
    loop = inspect.signature(torch_worker._worker_loop).parameters
    assert {"done_event", "init_fn"} <= set(loop)
    assert "target=_utils.worker._worker_loop" in inspect.getsource(torch_dataloader)
    assert "_utils.signal_handling._set_worker_pids(" in inspect.getsource(torch_dataloader)
    body = inspect.getsource(torch_worker._worker_loop)
    assert body.index("_set_worker_signal_handlers()") < body.index("init_fn(worker_id)")
    ends = inspect.getsource(torch_dataloader._MultiProcessingDataLoaderIter._shutdown_workers)
    assert ends.index("_workers_done_event.set()") < ends.index("w.terminate()")


def test_results_are_tensors_that_are_replaced_and_can_be_made_from_what_a_log_says(tmp_path) -> None:
    training = trainer(tmp_path, max_epochs=1)
    connector, results = training._logger_connector, training.fit_loop.epoch_loop._results
    assert connector._callback_metrics == {}
    results.log("training_step", "loss", torch.tensor(2.0), on_step=True, on_epoch=True, batch_size=3)
    result = results["training_step.loss"]
    value, count = result.value, result.cumulated_batch_size
    results.log("training_step", "loss", torch.tensor(4.0), on_step=True, on_epoch=True, batch_size=1)
    assert (value.item(), count.item()) == (6.0, 3), "a snapshot holds references"
    assert (result.value.item(), result.cumulated_batch_size.item(), result._forward_cache.item()) == (10.0, 4, 4.0)
    assert (result.has_reset, result.is_tensor, result.meta.sync.group, result._update_count) == (False, True, None, 2)
    assert inspect.getsource(pl.LightningModule.log).count("results.log(") == 1
    fields = {"fx", "name", "reduce_fx", "prog_bar", "logger", "enable_graph", "add_dataloader_idx"}
    assert fields <= set(vars(result.meta))
    assert {"fn", "_should", "rank_zero_only"} <= set(vars(result.meta.sync))
    results.reset()
    assert result.has_reset


def test_only_the_first_batch_of_an_epoch_resets_what_it_logs(tmp_path) -> None:
    connector = trainer(tmp_path)._logger_connector
    answers = []
    for state in (None, True, False):
        connector._first_loop_iter = state
        answers.append(connector.should_reset_tensors("training_step"))
    assert answers == [True, True, False]
    assert "elif self._first_loop_iter is True:" in inspect.getsource(type(connector).on_batch_start)


def test_the_epochs_after_a_fits_first_one_make_their_iterator_when_their_loop_begins(tmp_path) -> None:
    loop = trainer(tmp_path).fit_loop
    assert loop.is_resuming is False
    assert loop.epoch_loop.restarting is False
    condition = "if self.trainer.current_epoch > 0 and not self.trainer.fit_loop.is_resuming and not self.restarting:"
    assert condition in inspect.getsource(type(loop.epoch_loop).on_run_start)
    assert inspect.getsource(type(loop).setup_data).count("iter(self._data_fetcher)") == 1
    assert "self.val_loop.increment_progress_to_evaluation_end()" in inspect.getsource(type(loop.epoch_loop).advance)
    assert "iter(data_fetcher)" in inspect.getsource(type(loop.epoch_loop.val_loop).reset)


def test_torchmetrics_keep_their_state_in_attributes_and_count_their_updates() -> None:
    metric = torchmetrics.MeanMetric()
    assert metric._update_count == 0
    metric.update(3.0)
    metric.compute()
    assert (metric._update_count, metric._computed.item()) == (1, 3.0)
    assert {name: value.item() for name, value in metric.metric_state.items()} == {"mean_value": 3.0, "weight": 1.0}
    metric.mean_value = torch.tensor(8.0)
    metric._computed = None
    assert metric.compute().item() == 8.0


def test_ddp_makes_buffers_equal_before_it_runs_the_module_by_a_method_that_can_be_wrapped() -> None:
    forward = inspect.getsource(DistributedDataParallel.forward)
    assert forward.index("self._pre_forward(") < forward.index("self._run_ddp_forward(")
    assert "_sync_buffers()" in inspect.getsource(DistributedDataParallel._pre_forward)


def test_a_capture_asks_the_strategy_for_the_models_state() -> None:
    assert "strategy.lightning_module_state_dict()" in inspect.getsource(
        _CheckpointConnector._get_lightning_module_state_dict
    )


def test_tensors_can_be_copied_all_at_once() -> None:
    kept = [torch.zeros(2), torch.zeros((), dtype=torch.int64)]
    torch._foreach_copy_(kept, [torch.ones(2), torch.tensor(3)])
    assert [one.tolist() for one in kept] == [[1.0, 1.0], 3]


def test_a_module_keeps_its_buffers_in_a_dictionary() -> None:
    norm = torch.nn.BatchNorm1d(2)
    assert norm._buffers["running_mean"] is norm.running_mean
    norm.running_mean = norm.running_mean + 1
    assert norm._buffers["running_mean"] is norm.running_mean


def test_gradients_are_finished_in_one_place_before_each_step_of_an_optimizer(tmp_path) -> None:
    """Where ours is told: after the hooks and the clipping, before the parameters change."""
    told = []

    class Telling(Line):
        def configure_gradient_clipping(self, *args, **kwargs) -> None:
            told.append("clips")

    model, fitted = Telling(), trainer(tmp_path, max_steps=1)
    before = model.layer.weight.clone()
    _lightning.call_around_step(
        fitted,
        lambda: told.append(torch.equal(before, model.layer.weight)),
        lambda: told.append(not torch.equal(before, model.layer.weight)),
    )
    fitted.fit(model)
    assert told == ["clips", True, True]
    assert not torch.equal(before, model.layer.weight)


def test_each_rank_captures_its_own_shards_unless_one_file_is_asked_for() -> None:
    assert ModelParallelStrategy()._save_distributed_checkpoint is True
    assert ModelParallelStrategy(save_distributed_checkpoint=False)._save_distributed_checkpoint is False


def test_a_rank_writes_its_shards_without_the_others_in_the_files_that_lightning_reads(tmp_path) -> None:
    shards, rest = _sharded.divide({"state_dict": {"a": torch.ones(2)}, "optimizer_states": [{"b": 1}], "epoch": 3})
    _sharded.write_shards(shards, str(tmp_path), rank=7)
    index = tmp_path / f"__7{_sharded.METADATA}"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["__7_0.distcp", index.name])
    # What a folder of shards is known by, and is read by.
    index.rename(tmp_path / filesystem._metadata_fn)
    torch.save(rest, tmp_path / _METADATA_FILENAME)
    assert (filesystem._metadata_fn, _METADATA_FILENAME) == (_sharded.METADATA, _sharded.REST)
    assert _is_sharded_checkpoint(tmp_path)
    dcp_to_torch_save(tmp_path, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert whole.keys() == {"state_dict", "optimizer_0"}
    assert torch.equal(whole["state_dict"]["a"], torch.ones(2))
    assert whole["optimizer_0"] == {"b": 1}


def test_process_groups_are_found_with_their_backends_and_aborted_alone() -> None:
    """What NCCL's have more, a torch built with it shows; `tests/gpu` shows what it does."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        (group,) = distributed_c10d._world.pg_map
        assert group._get_backend(torch.device("cpu")).abort
    finally:
        dist.destroy_process_group()
    nccl = getattr(distributed_c10d, "ProcessGroupNCCL", None)
    assert nccl is None or all(hasattr(nccl, name) for name in ("abort", "get_error"))


def test_connection_that_lightning_ends_with_the_process_is_one_function() -> None:
    from lightning.fabric.utilities import distributed

    assert "atexit.register(_destroy_dist_connection)" in inspect.getsource(distributed._init_dist_connection)

"""argparse's private name that the launcher leans on, as it is in Python 3.10 to 3.14: which flags a parser has."""

from __future__ import annotations

import argparse

from elastic_fit.launch.parser import build_parser


def test_a_parser_keeps_every_spelling_of_its_flags_under_a_private_name() -> None:
    parser = argparse.ArgumentParser()
    log_dir = parser.add_argument("--log-dir", "--log_dir", "-l")
    with_parent = argparse.ArgumentParser(parents=[parser], add_help=False)
    for each in (parser, with_parent):
        assert set(each._option_string_actions) == {"-h", "--help", "--log-dir", "--log_dir", "-l"}
        assert each._option_string_actions["-l"] is log_dir


def test_the_launchers_parser_knows_torchruns_flags_from_its_own() -> None:
    parser = build_parser()
    assert parser.flags["-m"].dest == "module"
    assert parser.flags["--nproc_per_node"] is parser.flags["--nproc-per-node"]
    assert {"--nnodes", "-t", "--help"} <= parser.torchruns
    assert "--keep" in set(parser.flags) - parser.torchruns

"""Paths that the command line names and nothing can be done with: one line, no traceback, nothing lost."""


def test_a_log_folder_inside_a_file_is_refused_in_one_line_and_the_store_can_be_continued(
    folder, tmp_path, tiny, pipeline
):
    (tmp_path / "file").write_text("")
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)
    code, _, err = pipeline(*arguments, "--log-dir", tmp_path / "file" / "logs")
    assert code == 1
    assert f"error: {tmp_path / 'file' / 'logs'} cannot be used: Not a directory; name another path" in err
    assert pipeline(*arguments)[0] == 0

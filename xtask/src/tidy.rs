pub(crate) fn main(_: bool) -> anyhow::Result<()> {
    Ok(())
}

//! `vmm template ls|rm|build`.

use std::io::Read;
use std::path::Path;
use std::time::SystemTime;

use anyhow::Context;
use machine::config::{BlockConfig, DeviceConfig, MachineConfig};
use machine::host::Host;

use super::snapshot::{ago, mebibytes};
use crate::args::RunArgs;
use crate::args::snapshot::TemplateCommand;
use crate::template::{self, shape, store::Store};

/// Does it, and returns the exit code.
///
/// # Errors
/// When it cannot be done.
pub fn run(command: &TemplateCommand) -> anyhow::Result<u8> {
    match command {
        TemplateCommand::Ls => list()?,
        TemplateCommand::Rm { names, all } => {
            let store = Store::open()?;
            let known = store.list().context("cannot list the templates")?;
            let names =
                if *all { known.into_iter().map(|entry| entry.name).collect() } else { names.clone() };
            for name in names {
                store.remove(&name)?;
            }
        }
        TemplateCommand::Build(args) => build(args)?,
    }
    Ok(0)
}

fn list() -> anyhow::Result<()> {
    let store = Store::open()?;
    let entries = store.list().context("cannot list the templates")?;
    if entries.is_empty() {
        println!("no templates in {}", store.path().display());
        return Ok(());
    }
    println!(
        "{:<18}{:>6}{:>8}{:>9}{:>10}  {:<14}KERNEL",
        "NAME", "VCPUS", "MEMORY", "DEVICES", "SIZE", "BUILT"
    );
    for entry in entries {
        let age = SystemTime::now().duration_since(entry.modified).unwrap_or_default();
        match template::describe(&entry.directory) {
            Some(manifest) => println!(
                "{:<18}{:>6}{:>8}{:>9}{:>10}  {:<14}{}",
                entry.name,
                manifest.config.vcpus,
                manifest.config.memory.size.to_string(),
                manifest.config.devices.len(),
                mebibytes(entry.bytes),
                ago(age),
                manifest.config.boot.kernel.display()
            ),
            None => println!("{:<18}damaged: remove it", entry.name),
        }
    }
    Ok(())
}

/// The template of the machine that `args` describe; or, for the process that starts this, exactly the one that it describes on our
/// standard input, where it says.
fn build(args: &RunArgs) -> anyhow::Result<()> {
    let host = Host::detect()?;
    if let Some(target) = std::env::var_os("VMM_TEMPLATE_TARGET")
        && args.config.as_deref() == Some(Path::new("-"))
    {
        let mut text = Vec::new();
        std::io::stdin()
            .take(1 << 20)
            .read_to_end(&mut text)
            .context("cannot read the template's description")?;
        let config = MachineConfig::from_json(Path::new("-"), &text)?;
        template::build(&config, &host, Path::new(&target))?;
        return Ok(());
    }
    let mut config = args.machine()?;
    // Whatever the root is, it is not in the template.
    let root = args.rootfs.clone().unwrap_or_else(|| "root".into());
    config.devices.insert(0, DeviceConfig::Block(BlockConfig { path: Some(root), read_only: true }));
    let fitted =
        shape::fit(&config).context("no template can be made of such a machine: it would boot by itself")?;
    let directory = template::find_or_build(&fitted.template, &host)?;
    println!("{}", directory.display());
    Ok(())
}

//! Templates: built once, never written to, and never in the way.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use prober::{Checksum, Pattern};
use tests::machine::Place;
use tests::{TapNetwork, Vmm, artefacts, require_kvm, require_root};

const PREPARING: &str = "vmm: preparing a template";

fn template(store: &Path, words: &[&str]) -> Vmm {
    Vmm::new().arg("template").args(words).templates(store)
}

/// The names in a store, as `ls` lists them.
fn names(store: &Path) -> Vec<String> {
    let out = template(store, &["ls"]).run().expect(0).out();
    let lines = out.lines().filter(|line| !line.starts_with("no templates")).skip(1);
    lines.filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect()
}

/// Checksums of a template's files.
fn checksums(directory: &Path) -> BTreeMap<PathBuf, u64> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.clone(), Checksum::of(&fs::read(path).unwrap()))).collect()
}

/// Small, so that it boots soon.
fn small(store: &Path) -> Vmm {
    Vmm::prober().args(["--memory", "64M"]).templates(store)
}

/// Two machines find none, and one builds it; it stays as it was; it is listed and removed; what is damaged is no hindrance.
#[test]
fn the_life_of_a_template() {
    require_kvm!();
    let place = Place::new();
    let store = place.path("store");
    let none = small(&store).cold().command(&["true"]).run().expect(0);
    assert_eq!(none.err(), "");
    assert!(names(&store).is_empty(), "who boots builds none");

    let both = [0, 1].map(|_| small(&store).shell("echo here").start());
    let both = both.map(|running| running.wait().expect(0));
    let said = both.iter().filter(|ended| ended.err().starts_with(PREPARING)).count();
    assert_eq!(said, 1, "one of them builds it: {both:?}");
    assert!(both.iter().all(|ended| ended.out() == "here\n" && ended.err().lines().count() <= 1), "{both:?}");
    let [name] = names(&store).try_into().unwrap();
    assert_eq!(fs::metadata(&store).unwrap().permissions().mode() & 0o777, 0o700);

    let directory = store.join(&name);
    let before = checksums(&directory);
    assert!(before.len() >= 3, "{before:?}");
    let runs = if std::env::var_os("VMM_SLOW").is_some() { 100 } else { 10 };
    for _ in 0..runs / 2 {
        // What they write to memory is theirs alone.
        let script = "head -c 100000 /dev/zero >/tmp/x; wc -c </tmp/x";
        let both = [0, 1].map(|_| small(&store).shell(script).start());
        for ended in both.map(|running| running.wait().expect(0)) {
            assert_eq!((ended.out().trim(), ended.err().as_str()), ("100000", ""));
        }
    }
    assert_eq!(checksums(&directory), before, "a template is never written to");

    damaged_templates(&store, &directory);
    let listed = template(&store, &["ls"]).run().expect(0).out();
    assert!(listed.contains("64M"), "{listed}");
    for name in names(&store) {
        template(&store, &["rm", &name]).run().expect(0);
    }
    assert!(names(&store).is_empty());
    template(&store, &["rm", &name]).run().expect(125).refused(&[&name]);
}

/// A machine whose template is damaged says so, and runs all the same.
fn damaged_templates(store: &Path, directory: &Path) {
    let edit = |name: &str, change: &dyn Fn(&File)| {
        let path = directory.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let whole = fs::read(&path).unwrap();
        change(&File::options().write(true).open(&path).unwrap());
        whole
    };
    let flip = |file: &File| file.write_all_at(b"\xff\x00\xff", 100).unwrap();
    let cut = |file: &File| file.set_len(1 << 20).unwrap();
    for name in ["state", "manifest", "memory"] {
        let whole = edit(name, if name == "memory" { &cut } else { &flip });
        let ended = small(store).shell("echo here").run().expect(0);
        assert_eq!(ended.out(), "here\n");
        let err = ended.err();
        assert!(err.contains("template") && err.lines().count() <= 2, "{name}: {err}");
        println!("{err}");
        // It may have been made anew.
        if directory.join(name).exists() {
            fs::write(directory.join(name), whole).unwrap();
        }
    }
}

/// Each kind of machine has its own; machines of one kind share.
#[test]
fn what_a_template_depends_on() {
    require_kvm!();
    let place = Place::new();
    let store = place.path("store");
    let image = artefacts::guest_programs();
    let (kernel, other) = (artefacts::vmlinux(), place.path("kernel"));
    fs::copy(&kernel, &other).unwrap();
    let build = |kernel: &Path, words: &[&str]| {
        let build = template(&store, &["build", "--memory"]).args(words).arg("--kernel").arg(kernel);
        PathBuf::from(build.arg("--rootfs").arg(&image).run().expect(0).out().trim())
    };
    let plain = build(&kernel, &["64M"]);
    let before = fs::metadata(plain.join("manifest")).unwrap().modified().unwrap();
    // Commands, images and names of hosts make no difference.
    assert_eq!(build(&kernel, &["64M", "--hostname", "box", "-e", "A=b", "--vsock", "/nowhere"]), plain);
    assert_eq!(fs::metadata(plain.join("manifest")).unwrap().modified().unwrap(), before, "not built again");
    let kinds = [plain, build(&kernel, &["64M", "--cpus", "2"]), build(&other, &["64M"])];
    let distinct: std::collections::BTreeSet<_> = kinds.iter().collect();
    assert_eq!(distinct.len(), kinds.len(), "{kinds:?}");
    assert_eq!(names(&store).len(), kinds.len());
    // Some have none.
    let build = template(&store, &["build", "--track-dirty"]).arg("--kernel").arg(&kernel);
    build.run().expect(125).refused(&["template"]);
    template(&store, &["rm", "--all"]).run().expect(0);
    assert!(names(&store).is_empty());
}

/// Disks and a card of a machine that has been copied are those that it was given, by their names.
#[test]
fn disks_and_a_card() {
    require_kvm!();
    require_root!();
    let (place, network) = (Place::new(), TapNetwork::new());
    let content = |n: usize| Pattern::bytes(n << 12).into_iter().rev().collect::<Vec<_>>();
    let disks = [1, 2, 3].map(|n| {
        let path = place.path(&format!("disk{n}"));
        fs::write(&path, content(n)).unwrap();
        path
    });
    let script = "for disk in vdb vdc vdd; do echo $disk: $(blockdev --getsize64 /dev/$disk) $(blockdev --getro /dev/$disk) \
                  $(prober checksum </dev/$disk); done; echo count: $(ls /dev | grep -c '^vd'); \
                  echo mac: $(cat /sys/class/net/eth0/address); echo address: $(ip -4 -o addr show eth0); \
                  echo routes: $(ip route); ping -c 1 -W 20 10.9.0.1 >/dev/null; echo ping: $?; \
                  prober pattern 512 | dd of=/dev/vdd conv=notrunc,fsync 2>/dev/null";
    let ended = Vmm::prober()
        .within(&network.prefix())
        .disk(&disks[0])
        .arg("--disk")
        .arg(format!("{},ro", disks[1].display()))
        .disk(&disks[2])
        .args(["--net", "tap=tap0,mac=02:00:00:00:00:09,ip=10.9.0.7/24,gw=10.9.0.1"])
        .shell(script)
        .run()
        .expect(0);
    for (n, name, read_only) in [(1, "vdb", 0), (2, "vdc", 1), (3, "vdd", 0)] {
        let size = n << 12;
        let sum = Checksum::of(&content(n));
        assert_eq!(ended.field(name), format!("{size} {read_only} input: {size} {sum:016x}"), "{name}");
    }
    assert_eq!(ended.field("count"), "3");
    assert_eq!(ended.field("mac"), "02:00:00:00:00:09");
    assert!(ended.field("address").contains("10.9.0.7/24"), "{}", ended.transcript());
    assert!(ended.field("routes").contains("default via 10.9.0.1"));
    assert_eq!(ended.field("ping"), "0");
    assert_eq!(ended.err(), "");
    assert!(fs::read(&disks[2]).unwrap()[..512] == Pattern::bytes(512), "it was written");
    assert!(fs::read(&disks[0]).unwrap() == content(1) && fs::read(&disks[1]).unwrap() == content(2));
}

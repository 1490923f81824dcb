//! Who the command runs as: `user[:group]` by the container's `/etc/passwd` and `/etc/group`. Pure; the same rules as Docker's.

use alloc::format;
use alloc::vec::Vec;
use core::str;

use crate::error::Error;

/// What a process is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The supplementary groups.
    pub groups: Vec<u32>,
    /// The home directory.
    pub home: Vec<u8>,
}

impl Identity {
    /// Who runs what names nobody: root, without a look at the files. That is what an OCI runtime does with user 0, and reading two files
    /// costs more than it would tell.
    pub fn root() -> Self {
        Self { uid: 0, gid: 0, groups: Vec::new(), home: b"/root".to_vec() }
    }
}

/// Finds `user[:group]` in the two files' contents; no user means root. Numbers need not be in the files.
///
/// Without a group: the user's own, and those that list the user as a member. With one: only that.
pub fn identify(spec: &str, passwd: &[u8], group: &[u8]) -> Result<Identity, Error> {
    let (user, group_spec) = spec.split_once(':').unwrap_or((spec, ""));
    let user = if user.is_empty() { "0" } else { user };
    let number = id(user.as_bytes());
    let mut found = Identity { uid: number.unwrap_or(0), gid: 0, groups: Vec::new(), home: b"/".to_vec() };
    let mut name = None;
    match entries(passwd).find(|entry| entry.matches(user, number, 2)) {
        Some(entry) => {
            let (Some(uid), Some(gid)) = (entry.field(2).and_then(id), entry.field(3).and_then(id)) else {
                return Err(Error::Request(format!(
                    "the container's /etc/passwd has a bad entry for {user:?}"
                )));
            };
            (found.uid, found.gid) = (uid, gid);
            name = entry.field(0);
            if let Some(home) = entry.field(5).filter(|home| !home.is_empty()) {
                found.home = home.to_vec();
            }
        }
        None if number.is_none() => {
            return Err(Error::Request(format!("no user {user:?} in the container's /etc/passwd")));
        }
        None => (),
    }
    if group_spec.is_empty() {
        let member = |entry: &Entry<'_>| {
            name.is_some()
                && entry.field(3).is_some_and(|list| list.split(|&b| b == b',').any(|m| Some(m) == name))
        };
        found.groups =
            entries(group).filter(member).filter_map(|entry| entry.field(2).and_then(id)).collect();
        return Ok(found);
    }
    let number = id(group_spec.as_bytes());
    let entry = entries(group).find(|entry| entry.matches(group_spec, number, 2));
    found.gid = entry
        .and_then(|entry| entry.field(2).and_then(id))
        .or(number)
        .ok_or_else(|| Error::Request(format!("no group {group_spec:?} in the container's /etc/group")))?;
    Ok(found)
}

/// A line of fields between colons.
struct Entry<'a>(&'a [u8]);

impl<'a> Entry<'a> {
    fn field(&self, index: usize) -> Option<&'a [u8]> {
        self.0.split(|&byte| byte == b':').nth(index)
    }

    /// Whether this is `name`, or `number` in the field for it.
    fn matches(&self, name: &str, number: Option<u32>, index: usize) -> bool {
        self.field(0) == Some(name.as_bytes())
            || (number.is_some() && self.field(index).and_then(id) == number)
    }
}

fn entries(file: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    file.split(|&byte| byte == b'\n').filter(|line| !line.is_empty() && !line.starts_with(b"#")).map(Entry)
}

/// An identity number. The largest means "leave as it is" to the kernel, so it is none.
fn id(text: &[u8]) -> Option<u32> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(text).ok()?.parse().ok().filter(|&id| id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &[u8] = b"# users\nroot:x:0:0:root:/root:/bin/sh\n\nweb:x:33:34:w:/srv:/bin/false\n1000:x:7:8::/odd:\nbad:x:y:z::/:\nhomeless:x:5:5:::";
    const GROUP: &[u8] = b"root:x:0:\nwheel:x:10:root,web\nwww:x:34:\naudio:x:29:web2,web\nbad:x:q:web\n";

    fn of(spec: &str) -> Option<(u32, u32, Vec<u32>, String)> {
        let identity = identify(spec, PASSWD, GROUP).ok()?;
        Some((identity.uid, identity.gid, identity.groups, String::from_utf8(identity.home).unwrap()))
    }

    #[test]
    fn users_and_groups() {
        let expect =
            |uid, gid, groups: &[u32], home: &str| Some((uid, gid, groups.to_vec(), home.to_string()));
        assert_eq!(of(""), expect(0, 0, &[10], "/root"));
        assert_eq!(of("0"), expect(0, 0, &[10], "/root"));
        assert_eq!(of("root"), expect(0, 0, &[10], "/root"));
        assert_eq!(of("web"), expect(33, 34, &[10, 29], "/srv"));
        assert_eq!(of("33"), expect(33, 34, &[10, 29], "/srv"));
        assert_eq!(of("web:wheel"), expect(33, 10, &[], "/srv"));
        assert_eq!(of(":wheel"), expect(0, 10, &[], "/root"));
        assert_eq!(of("web:4000"), expect(33, 4000, &[], "/srv"));
        assert_eq!(of("4000"), expect(4000, 0, &[], "/"));
        assert_eq!(of("4000:29"), expect(4000, 29, &[], "/"));
        assert_eq!(of("homeless"), expect(5, 5, &[], "/"));
        // A name wins over a number, as in Docker.
        assert_eq!(of("1000"), expect(7, 8, &[], "/odd"));
    }

    #[test]
    fn nobody() {
        for spec in ["nobody", "web:nogroup", "bad", "4294967295", "99999999999", "-1", "+1", "web:-1"] {
            assert_eq!(of(spec), None, "{spec}");
        }
    }

    #[test]
    fn without_files() {
        let identity = identify("", b"", b"").unwrap();
        assert_eq!((identity.uid, identity.gid, identity.home), (0, 0, b"/".to_vec()));
    }

    proptest! {
        #[test]
        fn any_files(spec in "[a-z0-9:]{0,9}", passwd in "[a-z0-9:,\n]{0,60}", group in "[a-z0-9:,\n]{0,60}") {
            if let Ok(identity) = identify(&spec, passwd.as_bytes(), group.as_bytes()) {
                prop_assert!(identity.uid != u32::MAX && identity.gid != u32::MAX);
            }
        }
    }
}

//! What a person wants to run, and what becomes of it together with what the image says. Pure, but for random numbers and the time.

use std::time::{SystemTime, UNIX_EPOCH};

use protocol::{Begin, ByteString, Disk, Identity, Network, Root, Seed, Start, Token, WindowSize};

use super::image::ImageConfig;

/// What to run, as far as the command line says it. The rest is the image's.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The disk with the image.
    pub root: Root,
    /// Command and arguments; empty for the image's own.
    pub command: Vec<ByteString>,
    /// `NAME=value` words that come after the image's.
    pub env: Vec<ByteString>,
    /// Directory to start in.
    pub workdir: Option<ByteString>,
    /// `user[:group]`.
    pub user: Option<String>,
    /// Host name.
    pub hostname: Option<String>,
    /// Pass standard input.
    pub interactive: bool,
    /// A terminal of this size.
    pub terminal: Option<WindowSize>,
    /// Block devices that the container may use.
    pub disks: Vec<Disk>,
    /// Its network interface.
    pub network: Option<Network>,
    /// Whether it may use vsock itself.
    pub vsock: bool,
}

/// What the copy of a machine is to be that its container shall see.
#[derive(Debug, Clone, Default)]
pub struct NewSelf {
    /// Host name, if it gets another.
    pub hostname: Option<String>,
    /// Its machine id: 16 random bytes that no other machine has.
    pub machine_id: [u8; 16],
    /// The network interface, if it gets other addresses.
    pub network: Option<Network>,
    /// Pass standard input to a container that reads it.
    pub interactive: bool,
    /// Whoever restores it relies on it that it has a terminal.
    pub terminal: bool,
}

impl Request {
    /// Makes the machine one of its own, as of now.
    pub fn begin(&self) -> Result<Begin, String> {
        Ok(Begin { clock: clock(), seed: Seed(random()?), machine_id: random()?, root: self.root.clone() })
    }

    /// What to run: the image's own configuration, and over it what was asked for (as `docker run` combines them).
    pub fn start(&self, image: Option<&ByteString>) -> Result<Start, String> {
        let image = match image {
            Some(bytes) => ImageConfig::parse(bytes.as_bytes())
                .map_err(|e| format!("the image's /.vmm/image.json: {e}"))?,
            None => ImageConfig::default(),
        };
        let args = image.command(&self.command);
        if args.is_empty() {
            return Err("the image names no command of its own: say what to run after --".into());
        }
        let mut env: Vec<ByteString> = image.env.iter().map(|word| word.as_str().into()).collect();
        for word in &self.env {
            // The first of a name is the one that counts, for libc and for the agent.
            let name = variable(word);
            env.retain(|other| variable(other) != name);
            env.push(word.clone());
        }
        Ok(Start {
            token: Token(random()?),
            args,
            env,
            cwd: self.workdir.clone().unwrap_or_else(|| image.working_dir.as_str().into()),
            user: self.user.clone().unwrap_or(image.user),
            hostname: self.hostname.clone().unwrap_or_default(),
            terminal: self.terminal,
            stdin: self.interactive,
            disks: self.disks.clone(),
            network: self.network.clone(),
            vsock: self.vsock,
        })
    }
}

impl NewSelf {
    /// A machine that nothing was said of yet but that it is another one.
    pub fn random() -> Result<Self, String> {
        Ok(NewSelf { machine_id: random()?, ..NewSelf::default() })
    }

    /// The same, as of now and for the agent.
    pub fn identity(&self) -> Result<Identity, String> {
        Ok(Identity {
            clock: clock(),
            seed: Seed(random()?),
            hostname: self.hostname.clone(),
            machine_id: self.machine_id,
            network: self.network.clone(),
        })
    }
}

/// The name in `NAME=value`.
fn variable(word: &ByteString) -> Vec<u8> {
    word.as_bytes().split(|b| *b == b'=').next().unwrap_or_default().to_vec()
}

/// Nanoseconds since 1970; 0 on a host that believes to be before that.
fn clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn random<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    // Up to 256 bytes come whole or not at all (getrandom(2)).
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| format!("no random numbers from the host: {e}"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_comes_over_the_image() {
        let image: ByteString =
            r#"{"Cmd":["a"],"Env":["PATH=/image","A=1"],"WorkingDir":"/w","User":"1"}"#.into();
        let request = Request { env: vec!["PATH=/mine".into(), "B=2".into()], ..Request::default() };
        let start = request.start(Some(&image)).unwrap();
        assert_eq!(start.env, ["A=1".into(), "PATH=/mine".into(), "B=2".into()] as [ByteString; 3]);
        assert_eq!((start.cwd, start.user.as_str()), ("/w".into(), "1"));
        assert_ne!(start.token, Token::default());
    }

    #[test]
    fn an_image_without_a_command_needs_one() {
        assert!(Request::default().start(None).unwrap_err().contains("after --"));
        assert!(Request::default().start(Some(&"{".into())).unwrap_err().contains("image.json"));
    }

    #[test]
    fn no_two_are_the_same() {
        let request = Request::default();
        let (one, other) = (request.begin().unwrap(), request.begin().unwrap());
        assert_ne!(one.seed, other.seed);
        assert_ne!(one.machine_id, other.machine_id);
        assert!(one.clock > 1_700_000_000_000_000_000 && other.clock >= one.clock);
        let new = || NewSelf::random().unwrap().identity().unwrap();
        let (one, other) = (new(), new());
        assert_ne!(one.seed, other.seed);
        assert_ne!(one.machine_id, other.machine_id);
    }
}

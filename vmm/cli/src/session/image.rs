//! What an image says about how it wants to be run: the `config` object of an OCI image configuration.
//! (<https://github.com/opencontainers/image-spec/blob/main/config.md>.) Pure.

use protocol::ByteString;
use serde::Deserialize;

/// The part that matters here. Unknown keys are other people's.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    /// `NAME=value` words.
    pub env: Vec<String>,
    /// Directory to start in; empty for `/`.
    pub working_dir: String,
    /// `user[:group]`; empty for root.
    pub user: String,
}

/// As it stands in the file, where every list may be null.
#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Config {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
}

/// The whole file, or only its `config` object.
#[derive(Deserialize)]
struct File {
    config: Option<Config>,
    #[serde(flatten)]
    bare: Config,
}

impl ImageConfig {
    /// Reads the file. Both the whole image configuration and its `config` object alone will do.
    ///
    /// # Errors
    /// When it is no JSON, or a key has the wrong type.
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let file: File = serde_json::from_slice(bytes)?;
        let config = file.config.unwrap_or(file.bare);
        Ok(ImageConfig {
            entrypoint: config.entrypoint.unwrap_or_default(),
            cmd: config.cmd.unwrap_or_default(),
            env: config.env.unwrap_or_default(),
            working_dir: config.working_dir.unwrap_or_default(),
            user: config.user.unwrap_or_default(),
        })
    }

    /// What is executed when `given` was asked for: it takes the place of the image's `Cmd`, after its `Entrypoint`.
    pub fn command(&self, given: &[ByteString]) -> Vec<ByteString> {
        let own = |words: &[String]| words.iter().map(|w| ByteString::from(w.as_str())).collect::<Vec<_>>();
        let mut command = own(&self.entrypoint);
        command.extend(if given.is_empty() { own(&self.cmd) } else { given.to_vec() });
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(command: &[ByteString]) -> Vec<&[u8]> {
        command.iter().map(ByteString::as_bytes).collect()
    }

    #[test]
    fn an_image_configuration_is_read_whole_or_bare() {
        let bare =
            r#"{"Entrypoint":["/init","-x"],"Cmd":["a"],"Env":["A=1"],"WorkingDir":"/w","User":"1:2"}"#;
        let whole = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{bare},"rootfs":{{"type":"layers"}}}}"#
        );
        let config = ImageConfig::parse(bare.as_bytes()).unwrap();
        assert_eq!(ImageConfig::parse(whole.as_bytes()).unwrap(), config);
        assert_eq!((config.working_dir.as_str(), config.user.as_str()), ("/w", "1:2"));
        assert_eq!(words(&config.command(&[])), [&b"/init"[..], b"-x", b"a"]);
        assert_eq!(words(&config.command(&["b".into(), "c".into()])), [&b"/init"[..], b"-x", b"b", b"c"]);
    }

    #[test]
    fn nothing_is_needed_and_nonsense_is_refused() {
        assert_eq!(ImageConfig::parse(b"{}").unwrap(), ImageConfig::default());
        let null = r#"{"config":{"Entrypoint":null,"Cmd":null,"Env":null}}"#;
        assert_eq!(ImageConfig::parse(null.as_bytes()).unwrap(), ImageConfig::default());
        for wrong in [&b"["[..], b"[]", b"{\"Cmd\":\"sh\"}", b"", b"{\"config\":1}"] {
            assert!(ImageConfig::parse(wrong).is_err());
        }
    }
}

//! Lists in saved state that may not be longer than what they describe can be.
//!
//! A few bytes of a file can stand for a large structure: a short text may say that fields are missing, which then are zeros. So a
//! file's own length is no bound on the memory that reading it takes; these lists have one of their own. For
//! `#[serde(deserialize_with = "…")]`, on whatever thread reads a snapshot.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// Reads a list of `MOST` elements at most.
///
/// # Errors
/// Those of the deserializer, and one for a longer list, before its rest is read.
pub fn list<'de, D, T, const MOST: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    deserializer.deserialize_seq(List::<T, MOST>(PhantomData))
}

/// As [`list`], for one that may be missing.
///
/// # Errors
/// Those of [`list`].
pub fn optional_list<'de, D, T, const MOST: usize>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let list = Option::<Bounded<T, MOST>>::deserialize(deserializer)?;
    Ok(list.map(|list| list.0))
}

struct Bounded<T, const MOST: usize>(Vec<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Bounded<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        list::<D, T, MOST>(deserializer).map(Bounded)
    }
}

struct List<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for List<T, MOST> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {MOST} elements at most")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = seq.next_element()? {
            if elements.len() == MOST {
                return Err(A::Error::custom(format_args!("a list of more than {MOST} elements")));
            }
            elements.push(element);
        }
        Ok(elements)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    struct Two {
        #[serde(deserialize_with = "super::list::<_, _, 2>")]
        all: Vec<u32>,
        #[serde(deserialize_with = "super::optional_list::<_, _, 2>")]
        some: Option<Vec<u32>>,
    }

    #[test]
    fn what_fits_is_read_and_what_does_not_is_refused() {
        let read = |text: &str| serde_json::from_str::<Two>(text).map_err(|error| error.to_string());
        assert_eq!(read(r#"{"all":[1,2],"some":[3]}"#), Ok(Two { all: vec![1, 2], some: Some(vec![3]) }));
        assert_eq!(read(r#"{"all":[],"some":null}"#), Ok(Two { all: vec![], some: None }));
        for long in [r#"{"all":[1,2,3],"some":null}"#, r#"{"all":[],"some":[1,2,3]}"#] {
            assert!(read(long).unwrap_err().contains("more than 2"), "{long}");
        }
    }
}

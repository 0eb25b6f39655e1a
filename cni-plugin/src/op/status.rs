//! STATUS: whether an ADD can be served now.

use hachi_net::Store;

use crate::{
    agent::Agent,
    conf::Conf,
    error::{Error, code},
    pool::Pool,
};

pub(crate) fn status(conf: &Conf) -> Result<(), Error> {
    check(conf).map_err(|error| error.code(code::NOT_AVAILABLE))
}

fn check(conf: &Conf) -> Result<(), Error> {
    let mut agent = Agent::connect(conf)?;
    if let Some(agent) = &mut agent {
        let status = agent.status()?;
        if !status.ready {
            return Err(Error::new(code::NOT_AVAILABLE, "the agent is not ready")
                .details(status.problems.join("; ")));
        }
    }
    let pool = Pool::find(conf, agent.as_mut())?;
    Store::open(&conf.ipam.data_dir)?.has_room(&pool.sets)?;
    Ok(())
}
